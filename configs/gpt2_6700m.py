"""GPT-3's 6.7B shape on wikitext-103-raw-v1, 0.5M tokens an update on 8 GPUs.

    python scripts/train.py --config configs/gpt2_6700m.py

6,658,596,864 parameters; predicted for 8 H100s (jaxlm plan --devices 8): 22.7 GiB and 11,100 tokens/s a GPU;
for 8 A100-80GBs 3,600.
ZeRO stage 3, activations recomputed. The text is far too small for it: 0.1B tokens.
No GPU figure has been measured: neither speed, nor memory, nor loss.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocab_size=50304,
        d_model=4096,
        n_heads=32,
        n_layers=32,
        d_ff=16384,
        max_seq_len=2048,
        dropout=0.0,
        attention_dropout=0.0,
        gradient_checkpointing=True,
    ),
    training=TrainingConfig(
        batch_size=4,
        gradient_accumulation_steps=8,
        learning_rate=1.2e-4,
        zero_stage=3,
        sample_tokens=0,  # a sample gathers all of the parameters, 25 GiB, on every device
        weight_decay=0.1,
        beta2=0.95,
        num_epochs=3,
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=2048),
)
