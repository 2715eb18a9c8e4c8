"""GPT-3's 1.3B shape on wikitext-103-raw-v1, 0.5M tokens an update on 8 GPUs.

    python scripts/train.py --config configs/gpt2_1300m.py

1,315,819,520 parameters; predicted for 8 H100s (jaxlm plan --devices 8): 33.1 GiB and 60,100 tokens/s a GPU;
for 8 A100-80GBs 21,600.
ZeRO stage 2, and 8 rows a micro-batch, as jaxlm plan --search found. The text is small for it: 0.1B tokens.
No GPU figure has been measured: neither speed, nor memory, nor loss.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        d_model=2048,
        n_heads=16,
        n_layers=24,
        d_ff=8192,
        max_seq_len=2048,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    training=TrainingConfig(
        batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        zero_stage=2,
        weight_decay=0.1,
        beta2=0.95,
        num_epochs=3,
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=2048),
)
