"""GPT-2 350M (GPT-3's "medium") on wikitext-103-raw-v1, 0.5M tokens an update on 8 GPUs.

    python scripts/train.py --config configs/gpt2_350m.py

354,871,296 parameters; predicted for 8 H100s (jaxlm plan --devices 8): 12.4 GiB and 195,000 tokens/s a GPU;
for 8 A100-80GBs 74,900.
No GPU figure has been measured: neither speed, nor memory, nor loss.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        d_model=1024,
        n_heads=16,
        n_layers=24,
        d_ff=4096,
        max_seq_len=1024,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    training=TrainingConfig(
        batch_size=8,
        gradient_accumulation_steps=8,
        learning_rate=3e-4,
        weight_decay=0.1,
        beta2=0.95,
        num_epochs=3,
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=1024),
)
