"""GPT-2 medium (350M parameters, 2048 tokens) on wikitext-103-raw-v1, with ZeRO sharding.

    python scripts/train.py --config configs/large.py

use_deepspeed without a file means ZeRO stage 2: optimizer state and gradients are sharded over the devices.
355,608,576 parameters; predicted for 8 H100s (jaxlm plan --devices 8): 4.1 GiB and 129,000 tokens/s a GPU;
for 8 A100-80GBs 49,500.
Not yet run on a GPU: no time, no memory and no loss has been measured.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(d_model=1024, n_heads=16, n_layers=24, d_ff=4096, max_seq_len=2048, gradient_checkpointing=True),
    training=TrainingConfig(
        batch_size=4, gradient_accumulation_steps=16, use_amp=True, use_deepspeed=True, num_epochs=1
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-103-raw-v1", max_length=2048),
)
