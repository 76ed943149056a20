"""The plain loop: a padded batch, the model's own logits, a masked mean, AdamW. What a careful person writes in an hour."""

from __future__ import annotations

import torch
from child import Setting, Stopwatch, Work, lora_config, run_child
from torch.nn import functional
from transformers import AutoModelForCausalLM


def train(work: Work, setting: Setting, stopwatch: Stopwatch) -> None:
    device = work.device
    model = AutoModelForCausalLM.from_pretrained(work.model_folder, dtype=torch.float32, attn_implementation="sdpa")
    if (config := lora_config(work)) is not None:
        from peft import get_peft_model

        model = get_peft_model(model, config)
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=work.facts["learning_rate"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )
    size = setting["rows_per_microbatch"]
    stopwatch.start()
    for rows in work.steps(setting["steps"]):
        gold = sum(len(work.rows[row]) - int(work.context_lengths[row]) for row in rows)
        total = 0.0
        for start in range(0, len(rows), size):
            input_ids, attention_mask, labels = padded(work, rows[start : start + size].tolist())
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
                ).logits
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device), reduction="sum"
            )
            loss = loss / gold
            loss.backward()
            total += loss.item()
            del logits, loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stopwatch.step_done(total)


def padded(work: Work, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels (-100 where nothing is learnt) of these rows, [rows, longest], padded on the right."""
    longest = max(len(work.rows[row]) for row in rows)
    input_ids = torch.full((len(rows), longest), work.facts["pad_id"], dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), -100, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids = torch.from_numpy(work.rows[row].astype("int64"))
        input_ids[place, : len(ids)] = ids
        attention_mask[place, : len(ids)] = 1
        labels[place, work.context_lengths[row] : len(ids)] = ids[work.context_lengths[row] :]
    return input_ids, attention_mask, labels


if __name__ == "__main__":
    run_child(train, ["torch", "transformers", "numpy"])
