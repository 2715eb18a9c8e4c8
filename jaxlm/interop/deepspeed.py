"""DeepSpeed's JSON file: each key sets fields of Config, is ignored because nothing follows from it, or is refused.

The tables in deepspeed.toml say which; docs/deepspeed.md shows them. Names, meanings and defaults are those of
https://www.deepspeed.ai/docs/config-json/, https://deepspeed.readthedocs.io/en/latest/schedulers.html and, where these
differ, of the program, github.com/deepspeedai/DeepSpeed; "auto" is from https://huggingface.co/docs/transformers/deepspeed.
"""

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, nearest, replace_fields, shown, type_name
from jaxlm.config.fields import accepts, excerpt, field_values
from jaxlm.config.schema import FIELDS
from jaxlm.config.validate import check_field
from jaxlm.errors import UserError

# --- The tables -------------------------------------------------------------------------------------------------------

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
LR, PEAK, LOWEST = "optimizer.params.lr", "scheduler.params.warmup_max_lr", "scheduler.params.warmup_min_lr"
STAGE, RATE = "zero_optimization.stage", "training.learning_rate"
KINDS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "text": str, "list": list, "object": dict}
KINDS |= {"int?": int | None, "text?": str | None, "object?": dict | None, "int|bool?": int | bool | None}

_json = functools.partial(excerpt, write=json.dumps)  # as it stands in the file: the quotes of "2" may be what is wrong


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a key: it sets `fields`, is ignored or refused for a reason, or there is code for it below."""

    kind: Any = object  # type of the value; a list has an item for each field
    fields: Sequence[str] = ()
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # DeepSpeed's value -> jaxlm's
    default: Any = None  # DeepSpeed's
    off: Sequence[Any] = (None,)  # values that ask for nothing
    ignored: str | None = None  # "": without a line in the report
    refused: str | None = None
    note: str = ""  # for the documentation
    hint: str = ""  # what to do about a wrong value


def _rules(tables: dict[str, Any]) -> dict[str, Rule]:
    """Dotted key -> rule."""
    rules = {key: Rule(**entry | {"kind": KINDS[entry["kind"]]}) for key, entry in tables["mapped"].items()}
    for reason, sections in tables["ignored"].items():
        off = (None,) if reason.startswith("XLA") else (None, False)  # a tuning key that is off still isn't followed
        for section, names in sections.items():
            for name, _, kind in (name.partition(":") for name in names.split()):
                rules[f"{section}.{name}".lstrip(".")] = Rule(KINDS[kind or "bool"], off=off, ignored=reason)
    for reason, keys in tables["refused"].items():
        for key in keys.split():
            rules[key] = Rule(off=(None, *tables["harmless"].get(key, [False])), refused=reason)
    return rules


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RULES = _rules(TABLES)

# --- Reading a file ---------------------------------------------------------------------------------------------------


def load(path: str) -> dict[str, Any]:
    """The JSON object in the file, with deprecated spellings and the optimizer's type as the tables have them.

    Raises:
      UserError: it can't be read, is no JSON object, or has a key twice, which DeepSpeed refuses too.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise UserError(f"{max(keys, key=keys.count)} is there twice; remove one")
        return dict(pairs)

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{error.strerror}; name a DeepSpeed JSON file") from error
    except ValueError as error:  # bad JSON, bad UTF-8
        raise UserError(f"not JSON ({error}); comments are not taken") from error
    if not isinstance(values, dict):
        raise UserError("must hold a JSON object")
    if "bf16" in values and "bfloat16" in values:
        raise UserError("bf16 and bfloat16 are the same section; remove one")
    values = {"bf16" if key == "bfloat16" else key: value for key, value in values.items()}
    zero, optimizer = values.get("zero_optimization"), values.get("optimizer")
    if isinstance(zero, bool):
        values["zero_optimization"] = {"stage": int(zero)}
    if isinstance(optimizer, dict) and isinstance(optimizer.get("type"), str):
        values["optimizer"] = optimizer | {"type": TABLES["any_case"].get(optimizer["type"].lower(), optimizer["type"])}
    return values


def read(values: dict[str, Any], section: str = "", names: Collection[str] = ()) -> dict[str, Any]:
    """Values and sections by dotted key, names and types checked; of a section that is switched off only `enabled`."""
    prefix = section and f"{section}."
    names = names or {key.removeprefix(prefix).partition(".")[0] for key in RULES if key.startswith(prefix)}
    if "type" in names:  # which the names of params depend on
        values = {"type": None} | values
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in names:
            raise UserError(f"unknown key {key}{nearest(name, names)}")
        if key in RULES:
            found[key] = _checked(key, value)
        elif isinstance(value, dict):
            params = TABLES["params"][values["type"]].split() if name == "params" else ()
            found |= {key: value} | read(value, key, params)
        elif value is not None:
            raise UserError(f"{key} ({_json(value)}) must be an object")
    return {f"{prefix}enabled": False} if values.get("enabled") is False else found


def _checked(key: str, value: Any) -> Any:
    """`value`, if it has the type that the key's rule asks for; integers are often written as 5e8."""
    rule = RULES[key]
    if rule.refused is not None or (value == "auto" and not key.endswith(".type")):
        return value
    typed = int(value) if isinstance(value, float) and value.is_integer() and not accepts(rule.kind, value) else value
    valid = accepts(rule.kind, typed) and (not rule.values or typed in (None, *rule.values))
    if valid and (not isinstance(typed, list) or not rule.fields or len(typed) == len(rule.fields)):
        return typed
    wanted, hint = type_name(rule.kind).replace("dict", "an object").replace("none", "null"), rule.hint
    if rule.values:
        wanted = f"one of {', '.join(rule.values)}{nearest(str(value), rule.values)}"
    elif isinstance(value, str) and not hint:
        hint = "numbers, true and false stand without quotes"
    raise UserError(f"{key} ({_json(value)}) must be {wanted}{hint and '; '}{hint}")


# --- Applying it ------------------------------------------------------------------------------------------------------


def apply(config: Config, world: int | None) -> tuple[Config, list[str]]:
    """`config` with its deepspeed_config applied, and lines for the start-up report.

    Args:
      world: devices that rows are split over; None: not known yet, then what needs it is left as it is.

    Raises:
      UserError: the file is bad, asks for what jaxlm lacks, contradicts `config`, or does not fit `world`.
    """
    training, path = config.training, config.training.deepspeed_config
    if path is None:
        default = training.use_deepspeed and training.zero_stage is None
        return (replace_fields(config, {"training.zero_stage": 2}) if default else config), []
    if not path:
        raise UserError("training.deepspeed_config is empty; name a DeepSpeed JSON file, or none")
    try:
        if not training.use_deepspeed:
            raise UserError("set training.use_deepspeed true too")
        translation = _Translation(config, read(load(path)))
        translation.settle_batch(world)
        fields = translation.fields()
    except (UserError, RecursionError) as error:
        reason = "its brackets are nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"training.deepspeed_config ({path}): {reason}") from error
    return replace_fields(config, fields), [f"training.deepspeed_config: {line}" for line in translation.lines]


class _Translation:
    """The keys of a file as they become fields: what each sets is gathered first, then compared."""

    def __init__(self, config: Config, keys: dict[str, Any]) -> None:
        self.keys = keys  # dotted key -> value, sections too
        self.given = {key: value for key, value in keys.items() if value is not None and value != "auto"}
        self.own, self.unset = field_values(config), field_values(Config())
        self.claims: dict[str, list[tuple[Any, str]]] = {}  # field -> each value that a key gives it, and "KEY is ..."
        self.lines: list[str] = []
        self.settle_precision()
        self.follow_rules()
        self.settle_optimizer_and_scheduler()
        self.fill_in_defaults()
        self.settle_the_rest()

    def claim(self, field: str, value: Any, key: str, given: Any) -> None:
        """Notes that the file sets `field` to `value`, by what is `given` at `key`."""
        check_field(key, FIELDS[field], value)
        self.claims.setdefault(field, []).append((value, f"{key} is {_json(given)}"))

    def settle_precision(self) -> None:
        """The one of fp16 and bf16 that is enabled; float32 if a section is there but none is enabled; or Config's."""
        sections = {"float16": "fp16", "bfloat16": "bf16"}
        flags = {dtype: self.keys.get(f"{key}.enabled", False) for dtype, key in sections.items() if key in self.keys}
        own = self.own["training.amp_dtype"] if self.own["training.use_amp"] else "float32"
        enabled, disabled = ([dtype for dtype in flags if flags[dtype] is wanted] for wanted in (True, False))
        if len(enabled) == 2:
            raise UserError("fp16.enabled and bf16.enabled are both true; enable one")
        if enabled or (disabled and own != "float32" and flags.get(own) != "auto"):
            key = f"{sections[(enabled or disabled)[0]]}.enabled"
            self.claim("training.use_amp", bool(enabled), key, bool(enabled))
            self.claim("training.amp_dtype", (enabled or [self.unset["training.amp_dtype"]])[0], key, bool(enabled))
        if (enabled or [own]) != ["float16"]:  # many files have a loss scale and leave fp16 off
            self.keys = {key: value for key, value in self.keys.items() if not key.startswith("fp16.")}

    def follow_rules(self) -> None:
        """Does what the tables say of the keys that are there."""
        ignored: dict[str, list[str]] = {}  # reason -> keys
        for key, value in self.keys.items():
            rule = RULES.get(key, Rule())  # Rule(): a section
            off = isinstance(value, dict) and (not value or value.get("enabled") in (False, "auto"))
            if off or value in rule.off or (value == "auto" and rule.refused is None):
                continue
            if rule.refused is not None:
                words = key if isinstance(value, dict | list) else f"{key} ({_json(value)})"
                raise UserError(f"{words} is not supported: {rule.refused}")
            if rule.ignored:
                name = key.removeprefix("zero_optimization.").removesuffix(".enabled")
                ignored.setdefault(rule.ignored, []).append(name)
            ours = rule.values[value] if rule.values else None if key == "gradient_clipping" and value == 0 else value
            for field, part in zip(rule.fields, ours if isinstance(ours, list) else [ours], strict=False):
                self.claim(field, part, key, value)
        self.lines = [f"{', '.join(keys)} accepted: {reason}" for reason, keys in ignored.items()]

    def settle_optimizer_and_scheduler(self) -> None:
        """What their types mean beside `optimizer` and `lr_scheduler`; the scheduler's learning rate wins."""
        optimizer, scheduler = self.given.get("optimizer.type"), self.given.get("scheduler.type")
        if optimizer == "Adam" and self.given.get("optimizer.params.adam_w_mode") is False:
            self.claims["training.optimizer"] = [("adam", 'optimizer.type is "Adam"')]
        if optimizer == "Lamb":
            self.lines.append("DeepSpeed's Lamb keeps the trust ratio between 0.01 and 10, jaxlm's is not bounded")
        if scheduler == "WarmupDecayLR":
            self.claim("training.min_lr_ratio", 0.0, "scheduler.type", scheduler)
        if scheduler in ("WarmupDecayLR", "WarmupCosineLR") and "scheduler.params.total_num_steps" not in self.keys:
            raise UserError(f"scheduler.params.total_num_steps is missing; {scheduler} needs a number or auto")
        peak, rate = self.given.get(PEAK), self.given.get(LR)
        if rate is not None and PEAK not in self.keys and scheduler == "WarmupDecayLR":
            peak = RULES[PEAK].default
        if peak is not None:
            self.claims.pop(RATE, None)
            self.claim(RATE, peak, PEAK, peak)
            if rate not in (None, peak):
                self.lines.append(f"{PEAK} ({peak}) is the learning rate, as in DeepSpeed: not {rate}")

    def fill_in_defaults(self) -> None:
        """Claims DeepSpeed's defaults for what both the file and Config leave open; names the sections left out."""
        exceptions, filled, kept = [], [], []
        if self.given.get("scheduler.type") == "WarmupLR":
            exceptions.append(PEAK)  # it rises to the optimizer's learning rate
        if self.given.get("optimizer.params.torch_adam") and self.claims["training.optimizer"][0][0] == "adamw":
            exceptions.append("optimizer.params.weight_decay")  # the default of torch's AdamW is TrainingConfig's
        for key, rule in RULES.items():
            section, _, name = key.partition(".params.")
            applies = key == STAGE or name in TABLES["params"].get(self.keys.get(f"{section}.type"), "").split()
            if rule.default is None or not applies or key in self.keys or key in exceptions:
                continue
            (field,) = rule.fields
            if field not in self.claims and self.own[field] == self.unset[field]:
                self.claim(field, rule.default, key, rule.default)
                if rule.default != self.unset[field]:
                    filled.append(f"{key} {_json(rule.default)}")
        precision = "training.amp_dtype" if self.own["training.use_amp"] else "training.use_amp"
        for names, field in (TABLES["left_to_config"] | {"fp16, bf16": precision}).items():
            if self.keys.keys().isdisjoint(names.split(", ")):
                kept.append(f"{names} ({field} {shown(self.own[field])})")
        for whose, items in (("DeepSpeed", filled), ("TrainingConfig", kept)):
            if items:
                self.lines.append(f"left out of the file, so as {whose} has it: {', '.join(items)}")

    def settle_the_rest(self) -> None:
        """The start of warm-up, stage auto, activation checkpointing and trackers."""
        lowest = self.given.get(LOWEST)
        if lowest is not None:
            peak = self.claims[RATE][0][0] if RATE in self.claims else self.own[RATE]
            if not 0 <= lowest <= peak:
                raise UserError(f"{LOWEST} ({lowest}) must be from 0 to the peak learning rate ({peak})")
            self.claim("training.warmup_min_ratio", lowest / peak, f"{LOWEST} / {peak}", lowest / peak)
        if self.keys.get(STAGE) == "auto" and self.own["training.zero_stage"] is None:
            self.claim("training.zero_stage", 2, STAGE, "auto")
        if "activation_checkpointing" in self.keys:
            self.claim("model.gradient_checkpointing", True, "activation_checkpointing", "there")
        trackers = self.own["training.report_to"]
        wanted = {name: self.given.get(f"{name}.enabled", name in trackers) for name in ("tensorboard", "wandb")}
        changed = [name for name, flag in wanted.items() if flag != (name in trackers)]
        if changed:
            trackers = (*(name for name in trackers if name not in changed), *(n for n in changed if wanted[n]))
            self.claim("training.report_to", trackers, f"{changed[-1]}.enabled", wanted[changed[-1]])

    def settle_batch(self, world: int | None) -> None:
        """Two of the three batch sizes give the third; of one alone, accumulation is 1."""
        fields = {key: RULES[key].fields[0] for key in (MICRO, ACCUMULATION)}
        there = [key for key in (TRAIN, *fields) if self.keys.get(key) is not None]
        total = self.given.get(TRAIN)
        if not there:
            raise UserError(f"none of {TRAIN}, {', '.join(fields)} is there; set two of them, or auto")
        sizes = {key: self.given.get(key, self.own[fields[key]]) for key in fields if key in there}
        total_is_auto = self.keys.get(TRAIN) == "auto"
        if ACCUMULATION not in sizes and not total_is_auto and (total is None or MICRO not in sizes):
            sizes[ACCUMULATION] = 1
            self.claim(fields[ACCUMULATION], 1, f"{ACCUMULATION} (left out)", 1)
        if total is not None and total < 1:
            raise UserError(f"{TRAIN} ({total}) must be at least 1")
        if total is None:
            return
        factors = sizes | ({"devices": world} if world else {})
        product = math.prod(factors.values())
        words = " * ".join(f"{key} ({size})" for key, size in factors.items())
        exact = len(factors) == 3
        if total == product or (total % product == 0 and not exact):
            for missing in fields.keys() - sizes if world else ():
                self.claim(fields[missing], total // product, f"{TRAIN} ({total}) / ({words})", total // product)
            return
        fits = [f"{TRAIN} {n * product}" for n in ((1,) if exact else (total // product, total // product + 1)) if n]
        fits += [f"{key} {total * n // product}" for key, n in factors.items() if exact and not total * n % product]
        relation = "" if exact else "a multiple of "
        raise UserError(f"{TRAIN} ({total}) is not {relation}{words} = {product}; {' or '.join(fits)} would fit")

    def fields(self) -> dict[str, Any]:
        """The fields to set; UserError lists all that are given different values."""
        contradictions = []
        for field, claims in self.claims.items():
            if self.own[field] != self.unset[field]:
                claims = [(self.own[field], f"{field} is {shown(self.own[field])}"), *claims]
            if any(value != claims[0][0] for value, _ in claims):
                contradictions.append(", ".join(words for _, words in claims))
        if contradictions:
            mend = 'make them equal, leave the fields at their defaults, or write "auto" in the file'
            raise UserError(f"{'; '.join(contradictions)}; {mend}")
        return {field: claims[0][0] for field, claims in self.claims.items()}
