"""Objects in the cells of tables, as they were before they came into one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


def cleaner(kind: "pyarrow.DataType") -> Callable[[Any], Any]:
    """A function that takes the keys without a value out of the objects in a column of this type.

    All objects at one place of a table have the same keys: a call of one tool has the arguments of all others, as
    nulls (findings/datasets-fills-tool-arguments.sh). Only a message keeps its `content`, which may be null beside
    calls. Where objects are kept as text (the type Json of datasets), a null was meant.
    """
    import pyarrow

    if pyarrow.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        within = {field.name: cleaner(field.type) for field in fields}
        kept = {"content"} if "role" in within else set()

        def clean(value: Any) -> Any:
            if value is None:
                return None
            return {name: within[name](x) for name, x in value.items() if x is not None or name in kept}

        return clean
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        of_item = cleaner(kind.value_type)
        if of_item is not _as_it_is:
            return lambda value: None if value is None else [of_item(x) for x in value]
    return _as_it_is


def _as_it_is(value: Any) -> Any:
    return value
