"""The small model on the Python standard library of the running interpreter: no download, no account."""

from jaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig

config = Config(
    model=ModelConfig(vocab_size=8192, d_model=256, n_heads=4, n_layers=4, d_ff=1024, max_seq_len=512),
    training=TrainingConfig(
        batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_epochs=1,
        logging_steps=10,
        eval_steps=50,
        save_steps=50,
    ),
    data=DataConfig(dataset_name="python-stdlib", dataset_config=None, max_length=512),
)
