"""A custom preference loss on the fused head: DPO that length cannot win.

R-DPO (Park et al. 2024, arXiv 2403.19159, eq. 9) subtracts alpha times the difference of lengths
from DPO's margin. Any differentiable function of a pair's summed log-probs and token counts does.

    python trainer/examples/custom_loss.py MODEL [STEPS]
"""

import sys

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_kernels import fused_preference_loss, linear_logprobs

PAIRS = [
    ("Is water wet?", " Yes.", " Well, that is a long story, and a good question, too."),
    ("2 + 2?", " 4.", " It may be 4, or 5, or perhaps any other number you like."),
]


def encode(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2B, T), chosen sequences first, and labels (2B, T) that are already shifted."""
    rows = []
    for side in (1, 2):
        for pair in PAIRS:
            prompt, answer = (tokenizer(text)["input_ids"] for text in (pair[0], pair[side]))
            rows.append((prompt + answer, [-100] * (len(prompt) - 1) + answer + [-100]))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    return ids, labels


def main(name: str, steps: int = 10, beta: float = 0.1, alpha: float = 0.05) -> list[float]:
    """Train; returns the losses."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()  # no dropout
    ids, labels = encode(AutoTokenizer.from_pretrained(name))
    weight = model.get_output_embeddings().weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def hidden() -> torch.Tensor:
        return model.base_model(input_ids=ids).last_hidden_state  # padding is on the right

    with torch.no_grad():
        ref = linear_logprobs(hidden(), weight, labels).sum(1).view(2, -1)  # (2, B)

    def length_controlled(logps, counts, index):
        """Losses (b,) of log-probs (2, b) and token counts (2, b) of the pairs `index` (b,)."""
        ratios, lengths = logps - ref[:, index], counts[0] - counts[1]
        return -logsigmoid(beta * (ratios[0] - ratios[1]) - alpha * lengths)

    losses = []
    for _ in range(steps):
        loss, _ = fused_preference_loss(hidden(), weight, labels, length_controlled)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    name, *steps = sys.argv[1:]
    print(*main(name, *map(int, steps)), sep="\n")
