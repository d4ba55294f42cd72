"""The padded reference: transformers' model, logits everywhere, cross-entropy, AdamW; no trainer."""

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
        items = [rows[step * job.batch_size + i] for i in range(job.batch_size)]
        batch = {key: value.to(job.device) for key, value in collate(items).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(
            loss.item(),
            tokens=int(batch["attention_mask"].sum()),
            targets=int((labels != -100).sum()),
        )
    meter.write(job)


if __name__ == "__main__":
    main()
