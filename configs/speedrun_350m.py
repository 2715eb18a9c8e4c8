"""speedrun_124m.py at GPT-2 medium's size: half a million tokens an update, too, in smaller micro-batches.

    python scripts/train.py --config configs/speedrun_350m.py

353,557,504 parameters; predicted (jaxlm plan): 19.3 GiB and 178,000 tokens/s on an H100, so 16 hours for ten billion
tokens; 16.4 GiB and 34,000 on an RTX 4090, 83 hours. No GPU figure has been measured, and no loss.
"""

from jaxlm.config import load_config, replace_fields

config = replace_fields(
    load_config("speedrun_124m"),
    {
        "model.d_model": 1024,
        "model.n_heads": 8,
        "model.n_layers": 24,
        "model.d_ff": 4096,
        "training.batch_size": 16,
        "training.gradient_accumulation_steps": 32,
        "training.learning_rate": 3e-3,
    },
)
