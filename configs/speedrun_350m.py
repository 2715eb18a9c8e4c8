"""speedrun_124m.py at GPT-2 medium's size: half a million tokens an update, too, in smaller micro-batches.

    python scripts/train.py --config configs/speedrun_350m.py

353,557,504 parameters; predicted (jaxlm plan): 18.5 GiB and 184,000 tokens/s on an H100, so 15 hours for ten billion
tokens; 17.6 GiB and 35,500 on an RTX 4090, 78 hours. No GPU figure has been measured, and no loss.
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
