"""The recipe of speedrun.py at GPT-2 small's size, on FineWeb-Edu's sample of ten billion tokens, on one GPU.

    python scripts/train.py --config configs/speedrun_124m.py

123,590,400 parameters; predicted (jaxlm plan): 12.2 GiB; 504,000 tokens/s on an H100, so 5.5 hours for ten billion
tokens, and 99,000 on an RTX 4090, 28 hours. No GPU figure has been measured, and no loss.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        n_heads=6,
        dropout=0.0,
        attention_dropout=0.0,
        norm="rmsnorm",
        use_bias=False,
        positions="rotary",
        qk_norm=True,
    ),
    training=TrainingConfig(
        batch_size=32,
        gradient_accumulation_steps=16,
        learning_rate=4e-3,
        lr_scheduler="linear",
        min_lr_ratio=0.0,
        warmup_steps=200,
        optimizer="muon",
        beta2=0.95,
        num_epochs=1,
    ),
    data=DataConfig(
        dataset_name="HuggingFaceFW/fineweb-edu",
        dataset_config="sample-10BT",
        validation_split=None,
        validation_fraction=0.0005,
    ),
)
