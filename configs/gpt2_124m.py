"""GPT-2 124M (GPT-3's "small") on wikitext-103-raw-v1, 0.5M tokens an update on 8 GPUs.

    python scripts/train.py --config configs/gpt2_124m.py

124,475,904 parameters; predicted (jaxlm plan): 7.0 GiB; 552,000 tokens/s on an H100,
212,000 on an A100-80GB, 105,000 on an RTX 4090.
One H200, 32 rows an update: 470,000 tokens/s, 11.9 GiB at the peak (benchmarks/LOG.md). No loss has been measured.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        d_model=768,
        n_heads=12,
        n_layers=12,
        d_ff=3072,
        max_seq_len=1024,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    training=TrainingConfig(
        batch_size=16,
        gradient_accumulation_steps=4,
        learning_rate=6e-4,
        weight_decay=0.1,
        beta2=0.95,
        num_epochs=3,
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=1024),
)
