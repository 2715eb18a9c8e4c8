#!/usr/bin/env bash
# transformers' Trainer multiplies the balancing loss of experts by the number of accumulated batches, and smoothing drops it.
#
# transformers 5.24.0 with accelerate 1.15.0 and torch 2.13.0, on CPU in float32. gradient_accumulation_steps trades memory
# for time: one would take 2 rows in 4 parts for the same step as 8 rows at once, and for a plain model, or without the
# router's loss, it is, to rounding. But the model divides the tokens' loss by the tokens of all parts and adds its
# router_aux_loss_coef times the balancing loss to each part, and Trainer, which sees a loss that is divided already, sums.
# With 4 parts the coefficient is 4 times what config.json says, in the logged loss and in the router's gradient; Mixtral
# here, the other models with router_aux_loss_coef have the same lines. With label_smoothing_factor the loss is computed anew
# from the logits, and the balancing loss is left out. Right: the coefficient divided by gradient_accumulation_steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat >"$folder/parts.py" <<'PYTHON'
import sys

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

torch.manual_seed(1)
rows = [{"input_ids": x, "labels": x} for x in torch.randint(3, 60, (8, 16))]
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}


class Router(TrainerCallback):
    norm = 0.0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norm = torch.stack([x.grad.norm() for name, x in model.named_parameters() if "gate.weight" in name]).norm()


def step(coefficient: float, parts: int, smoothing: float = 0.0) -> tuple[float, float]:
    torch.manual_seed(0)
    model, router = MixtralForCausalLM(MixtralConfig(**shape, router_aux_loss_coef=coefficient)), Router()
    options = {"max_steps": 1, "logging_steps": 1, "max_grad_norm": 0, "report_to": [], "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    options |= {"label_smoothing_factor": smoothing, "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(sys.argv[1], **options), train_dataset=rows, callbacks=[router])
    trainer.train()
    return trainer.state.log_history[0]["loss"], float(router.norm)


for smoothing in (0.0, 0.1):
    plain, _ = step(0.0, 1, smoothing)
    for parts in (1, 4):
        loss, norm = step(0.1, parts, smoothing)
        share = f"balancing loss {abs(loss - plain):.1f} of {loss:.1f}, gradient of the routers {norm:.3f}"
        print(f"RESULT smoothing {smoothing}, 8 rows in {parts}: {share}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/parts.py" "$folder/out" 2>"$folder/stderr" | grep ^RESULT)
echo "$found"
[[ $found == "RESULT smoothing 0.0, 8 rows in 1: balancing loss 0.2 of 4.4, "*"
RESULT smoothing 0.0, 8 rows in 4: balancing loss 0.8 of 5.0, "*"
RESULT smoothing 0.1, 8 rows in 1: balancing loss 0.0 of 4.2, "*"
RESULT smoothing 0.1, 8 rows in 4: balancing loss 0.0 of 4.2, "* ]] || {
  echo "this has changed"
  exit 1
}
