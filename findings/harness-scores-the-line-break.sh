#!/usr/bin/env bash
# The evaluation harness scores the line break that a chat template's prompt ends with as a part of each answer.
#
# lm-eval 0.4.13, transformers 5.24.0 (lm_eval/api/model.py, TemplateLM._encode_pair). With --apply_chat_template one would
# take the log-likelihood of an answer for that of the answer's own tokens behind the prompt, as a loss on completions is.
# But white space at the end of a context goes to the continuation, for the sake of tokenizers whose words begin with
# their blank, and most templates end their prompt with a line break: its log-likelihood is added to each answer's. Choices of
# one question all get the same, so acc stays as it is; perplexities of answers do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "lm-eval[hf]==0.4.13" transformers==5.24.0 torch==2.13.0 tokenizers==0.23.3 jinja2==3.1.6
cat >"$folder/answer.py" <<'PYTHON'
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
words = ["<eos>", "<|user|>", "<|assistant|>", "\n", "what", "this"]
backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<eos>"))
backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\n|<\|\w+\|>|\w+"), "isolated")
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
)
torch.manual_seed(0)
config = transformers.GPT2Config(
    n_embd=32, n_head=2, n_layer=2, n_positions=32, vocab_size=6, bos_token_id=0, eos_token_id=0
)
model = transformers.GPT2LMHeadModel(config).eval()
for p in model.parameters():
    p.data += 0.2 * torch.randn_like(p)

harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=1)
prompt = harness.apply_chat_template([{"role": "user", "content": "what"}])
((found, _),) = harness.loglikelihood([Instance("loglikelihood", {}, (prompt, "this"), 0)], disable_tqdm=True)
ids = tokenizer(prompt + "this", add_special_tokens=False)["input_ids"]
with torch.no_grad():
    logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
before_each = [logs[i, token].item() for i, token in enumerate(ids[1:])]
print(f"prompt {prompt!r}")
print(f"that of the answer: {abs(found - before_each[-1]) < 1e-3}")
print(f"that of the line break and the answer: {abs(found - sum(before_each[-2:])) < 1e-3}")
PYTHON
found=$("$folder/venv/bin/python" "$folder/answer.py" 2>"$folder/stderr")
echo "$found"
[[ $found == "prompt '<|user|>\nwhat\n<|assistant|>\n'
that of the answer: False
that of the line break and the answer: True" ]] || {
  echo "this has changed"
  exit 1
}
