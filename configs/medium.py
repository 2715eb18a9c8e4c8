"""GPT-2 small (124M parameters) on wikitext-103-raw-v1 (100M words, from the Hugging Face Hub), for one GPU or more.

    python scripts/train.py --config configs/medium.py

124,242,432 parameters; predicted (jaxlm plan): 2.9 GiB; 401,000 tokens/s on an H100, 83,000 on an
RTX 4090.
Not yet run to its end: no time and no loss can be promised here.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(d_model=768, n_heads=12, n_layers=12, d_ff=3072, max_seq_len=1024, gradient_checkpointing=True),
    training=TrainingConfig(
        batch_size=8, learning_rate=1e-4, gradient_accumulation_steps=8, use_amp=True, num_epochs=3
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=1024),
)
