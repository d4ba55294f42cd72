"""Time of a training step and of the run, from FLOPs, bytes moved, links and image loading."""

from dataclasses import dataclass

from vlm_sft.config.method import Method
from vlm_sft.config.schema import RunConfig
from vlm_sft.model.activation_checkpointing import CheckpointPolicy
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.gpus import GPUS_PER_MACHINE, NETWORK
from vlm_sft.planning.step_stats import StepStats
from vlm_sft.utils.cores import available_cores


@dataclass(frozen=True)
class Speed:
    """Throughput of a run and what limits it.

    Attributes:
        samples_per_second: Records per second of all ranks.
        step_seconds: Seconds per optimizer step: the largest of `seconds`.
        hours: Hours of the run, without startup and evaluation.
        bottleneck: The key of the largest of `seconds`.
        seconds: Seconds per step of each activity; they overlap.
        teraflop_per_sample: Model FLOPs of a mean record: no padding, nothing recomputed.
        utilization: Those model FLOPs per second, as a share of the device's FLOP/s.
    """

    samples_per_second: float
    step_seconds: float
    hours: float
    bottleneck: str
    seconds: dict[str, float]
    teraflop_per_sample: float
    utilization: float


def estimate_speed(
    estimator: Estimator,
    method: Method,
    policy: CheckpointPolicy,
    stats: StepStats,
    *,
    images_per_second: float | None,
) -> Speed:
    """Return the speed of a training method.

    Args:
        estimator: The run and its device.
        method: The training method.
        policy: Activation checkpointing.
        stats: The run's micro-batches.
        images_per_second: Images per second of all data-loader workers; None: not considered.
    """
    device, gpus = estimator.device, estimator.gpus
    samples_per_step = estimator.config.train.global_batch_size
    steps_per_epoch = stats.total("records") / samples_per_step
    flops = estimator.simulation(method).flops
    epoch_flops = sum(flops.of_batch(batch, policy) for batch in stats.micro_batches)
    # Passes over the weights: forward, backward, and the recomputed forward.
    passes = 3 if policy == "full" else 2
    accumulation = stats.micro_batches_per_step
    compute_rate = gpus * device.flops * estimator.efficiency
    dequantize = passes * _dequantize_bytes(estimator, method) / device.bandwidth
    read_weights = passes * _language_model_bytes(estimator, method) / device.bandwidth
    seconds = {
        "compute": epoch_flops / steps_per_epoch / compute_rate + dequantize * accumulation,
        "memory bandwidth": read_weights * accumulation
        + _update_bytes_moved(estimator, method) / device.bandwidth,
    }
    if gpus > 1 and device.link:
        # A ring over several machines is as fast as its slowest link, the network.
        link = device.link if gpus <= GPUS_PER_MACHINE else min(device.link, NETWORK)
        seconds["links between GPUs"] = _communication_bytes(estimator, method, stats) / link
    if images_per_second:
        seconds["image loading"] = stats.total("images") / steps_per_epoch / images_per_second
    # These overlap in a well-built loop, so the slowest one alone sets the time of a step.
    step, bottleneck = max((value, key) for key, value in seconds.items())
    rate = samples_per_step / step
    teraflop = _teraflop_per_sample(estimator, method, stats)
    return Speed(
        samples_per_second=rate,
        step_seconds=step,
        hours=stats.num_records / rate / 3600,
        bottleneck=bottleneck,
        seconds=seconds,
        teraflop_per_sample=teraflop,
        utilization=teraflop * 1e12 * rate / gpus / device.flops,
    )


def loader_images_per_second(config: RunConfig, gpus: int, per_core: float | None) -> float:
    """Return images per second of all data-loader workers; 0 if the rate of a core is unknown.

    Each of the `gpus` ranks has its own workers (loading happens in its main process if there are
    none). All ranks are assumed to be on a machine with as many cores as this one.
    """
    loaders = max(1, config.data.num_workers) * gpus
    return (per_core or 0.0) * min(loaders, available_cores())


def _teraflop_per_sample(estimator: Estimator, method: Method, stats: StepStats) -> float:
    flops = estimator.simulation(method).flops.of(
        tokens=stats.mean_length,
        attention_pairs=stats.mean_attention_pairs,
        targets=stats.total("targets") / stats.total("records"),
        crops=stats.total("crops") / stats.total("records"),
    )
    return flops / 1e12


def _language_model_bytes(estimator: Estimator, method: Method) -> float:
    """Return the bytes of the language model in the compute dtype, read once per pass."""
    parts = parameters_by_part(estimator.model(method))
    weights = sum(p.numel() for part in ("language_model", "adapter") for _, p in parts[part])
    return float(weights * estimator.meta_model.dtype.itemsize)


def _dequantize_bytes(estimator: Estimator, method: Method) -> float:
    """Return the bytes moved to dequantize all layers once: 4-bit read, 16-bit written."""
    if not estimator.is_quantized(method):
        return 0.0
    sizes = estimator.quantized_layer_sizes(method)
    return float(
        estimator.quantized_bytes(sizes) + estimator.meta_model.dtype.itemsize * sum(sizes)
    )


def _update_bytes_moved(estimator: Estimator, method: Method) -> float:
    """Return the bytes that the optimizer's update reads and writes.

    Moments are read and written, gradients are read, and weights, as large as their float32
    gradients, are read and written.
    """
    static = estimator.static_memory(method)
    return 2 * static.optimizer + 3 * static.gradients


def _communication_bytes(estimator: Estimator, method: Method, stats: StepStats) -> float:
    """Return the bytes that one rank sends per step with ring collectives.

    A ring of N ranks sends (N - 1) / N of a tensor for an all-gather or a reduce-scatter, and twice
    that for an all-reduce (https://arxiv.org/abs/1910.02054, section 7).
    """
    share = (estimator.gpus - 1) / estimator.gpus
    own = estimator.static_memory(method).gradients / 4  # trainable weights held by this rank
    if not estimator.is_sharded(method):
        return 2 * share * 4 * own  # one all-reduce of float32 gradients per step
    trainable = own * estimator.gpus
    # Per micro-batch: an all-gather in the compute dtype before forward and before backward, and a
    # reduce-scatter of float32 gradients.
    gathered = 2 * trainable * estimator.meta_model.dtype.itemsize
    return stats.micro_batches_per_step * share * (gathered + 4 * trainable)
