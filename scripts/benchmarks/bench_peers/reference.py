"""The padded reference: transformers' model, all logits, cross-entropy, AdamW; no trainer."""

import torch
from measure import Job, Meter
from plain import Collator, Rows, load_model


def main() -> None:
    """Train the job's steps and write what they cost."""
    job = Job.from_command_line()
    rows, collate, model = Rows(job), Collator(job), load_model(job)
    model.to(job.device).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=job.learning_rate, weight_decay=0.0)
    meter = Meter(job.device)
    meter.start()
    for step in range(job.steps):
        starts = range(0, job.batch_size, job.micro_batch_size)
        places = [step * job.batch_size + start for start in starts]
        batches = [collate([rows[p + i] for i in range(job.micro_batch_size)]) for p in places]
        targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            batch = {key: value.to(job.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        meter.step(total / targets, tokens=tokens, targets=targets)
    meter.write(job)


if __name__ == "__main__":
    main()
