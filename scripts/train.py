"""Trains a language model: python scripts/train.py --config FILE [--SECTION.FIELD VALUE ...]"""

from jaxlm import cli
from jaxlm.config import validate


def train() -> None:
    parser = cli.Parser("Trains a language model. The same command again goes on where an unfinished run stopped.")
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, .py or .json")
    parser.add_argument("--resume_from_checkpoint", metavar="PATH", help="checkpoint folder to start from, or latest")
    parser.add_argument("--fresh", action="store_true", help="start over; the old folder is moved aside, not deleted")
    cli.add_config_options(parser)
    arguments = parser.parse_args()
    config = cli.config_from(arguments)
    if arguments.resume_from_checkpoint is not None:
        config = cli.replace_fields(config, {"training.resume_from_checkpoint": arguments.resume_from_checkpoint})
    validate(config)  # before JAX is imported, so that a mistake shows at once

    from jaxlm.trainer import Trainer

    Trainer(config, fresh=arguments.fresh).train()


if __name__ == "__main__":
    cli.main(train)
