"""transformers' Trainer with a collator of the user's own, as its vision examples have it."""

from measure import Job, Meter, measure_trainer
from plain import Collator, Rows, load_model
from transformers import Trainer, TrainingArguments


def main() -> None:
    """Train the job's steps and write what they cost."""
    job = Job.from_command_line()
    arguments = TrainingArguments(
        output_dir=job.work,
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.batch_size // job.micro_batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        gradient_checkpointing=bool(job.options.get("gradient_checkpointing", False)),
        bf16=job.device == "cuda",
        use_cpu=job.device == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=int(job.options.get("workers", 0)),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=load_model(job),
        args=arguments,
        train_dataset=Rows(job),
        data_collator=Collator(job),
    )
    meter = Meter(job.device)
    measure_trainer(trainer, meter)
    trainer.train()
    meter.write(job)


if __name__ == "__main__":
    main()
