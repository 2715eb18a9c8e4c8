"""The small model on wikitext-2-raw-v1 (2M words, from the Hugging Face Hub), with the guide's own values.

python scripts/train.py --config configs/wikitext2.py
"""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(vocab_size=8192, d_model=256, n_heads=4, n_layers=4, d_ff=1024, max_seq_len=512),
    training=TrainingConfig(
        batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=5e-4,
        num_epochs=3,
        logging_steps=10,
        eval_steps=100,
        save_steps=100,
    ),
    data=DataConfig(dataset_name="wikitext", dataset_config="wikitext-2-raw-v1", max_length=512),
)
