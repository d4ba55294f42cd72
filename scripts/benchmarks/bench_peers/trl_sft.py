"""TRL's SFTTrainer with its own collator for images and the loss on answers only."""

import datasets
from measure import Job, Meter, measure_trainer
from plain import load_model
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train the job's steps and write what they cost."""
    job = Job.from_command_line()
    rows = [{"messages": messages, "images": images} for messages, images in job.messages()]
    dataset = datasets.Dataset.from_list(rows)
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    config = SFTConfig(
        output_dir=job.work,
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.batch_size // job.micro_batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        max_length=job.max_length,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=job.device == "cuda",
        use_cpu=job.device == "cpu",
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=load_model(job),
        args=config,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(f"{job.model}/llava"),
    )
    meter = Meter(job.device)
    measure_trainer(trainer, meter)
    trainer.train()
    meter.write(job)


if __name__ == "__main__":
    main()
