"""A Llama-like 125M, to be compared with gpt2_124m: the same data, width, depth and size, with modern blocks.

    python scripts/train.py --config configs/llama_125m.py

124,766,976 parameters; predicted (jaxlm plan): 7.1 GiB; 519,000 tokens/s on an H100,
204,000 on an A100-80GB, 101,000 on an RTX 4090.
No GPU figure has been measured: neither speed (so no time either), nor memory, nor loss.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        d_model=768,
        n_heads=12,
        n_kv_heads=4,
        n_layers=12,
        d_ff=2432,
        max_seq_len=1024,
        dropout=0.0,
        attention_dropout=0.0,
        activation="swiglu",
        norm="rmsnorm",
        use_bias=False,
        positions="rotary",
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
