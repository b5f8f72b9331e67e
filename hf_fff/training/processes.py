"""Several processes: what would run, and what does not do what it seems to."""

import os
from pathlib import Path
from typing import Any

_SHARDED = ("FSDP", "DEEPSPEED")


def check_processes(args: Any) -> None:
    """Raises ``ValueError`` where the processes of a training would not do what was asked for, and Accelerate does not say so.

    Args:
        args: ``TrainingArguments``, or None.
    """
    if args is None:
        return
    on_cpu = args.device.type == "cpu"
    if on_cpu and (args.fsdp or _flag("ACCELERATE_USE_FSDP")):
        raise ValueError(
            f"fsdp={args.fsdp!r}{' and ACCELERATE_USE_FSDP' * _flag('ACCELERATE_USE_FSDP')}: Accelerate does not shard on a CPU, it would run "
            "DDP there without saying so. Leave it out, or train on GPUs"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if on_cpu and started > 1 and "LOCAL_RANK" in os.environ and args.world_size == 1:
        raise ValueError(
            f"use_cpu={args.use_cpu!r}: {started} processes were started where there is no GPU, and without use_cpu=True each would train alone"
        )


def check_not_sharded(args: Any) -> None:
    """Raises ``ValueError`` where each process would hold a part of a model that is distilled.

    Args:
        args: ``TrainingArguments``.
    """
    deepspeed = args.deepspeed or _flag("ACCELERATE_USE_DEEPSPEED")
    how = "DeepSpeed" if deepspeed else "FSDP" if args.fsdp or _flag("ACCELERATE_USE_FSDP") else None
    if how:
        raise ValueError(not_sharded(how))


def not_sharded(how: str) -> str:
    return (
        f"distillation does not run under {how}: nobody has tried its teacher and its units there. "
        "Use DDP (see examples/accelerate)"
    )


def what_would_run() -> dict[str, Any]:
    """What a training would run on: told by the environment where ``accelerate launch`` or ``torchrun`` has started this process, else by
    Accelerate's default config, which ``accelerate launch`` reads.

    Returns:
        ``told_by``; ``processes``; ``how``: "one process", "DDP", "FSDP2", "FSDP1" or "DeepSpeed ZeRO-N"; ``backend`` of the
        communication or None; ``devices`` of this machine, one for each of its processes; ``mixed_precision``; ``notes``: what is not as it
        seems.

    Raises:
        ValueError: Accelerate's config cannot be read.
    """
    import torch

    launched = "LOCAL_RANK" in os.environ
    told = _by_environment() if launched else _by_config()
    cpu, count, kind, notes = told.pop("cpu"), told["processes"], told.pop("kind"), []
    gpus = 0 if cpu else torch.cuda.device_count()
    if kind == "MULTI_CPU" and not told.pop("mpi", False) and not launched:
        notes.append(
            f"distributed_type: MULTI_CPU starts one process without mpirun (mpirun_hostfile), whatever num_processes={count} says: "
            "examples/accelerate/cpu_2.yaml starts several."
        )
        count = 1
    if kind in _SHARDED and not gpus:
        notes.append(
            f"{kind} needs GPUs: on a CPU Accelerate would run DDP without saying so, and our trainers refuse."
        )
    if launched and count > 1 and not gpus and not cpu:
        notes.append(
            "There is no GPU: give use_cpu=True to the training, or each process would train alone; our trainers refuse."
        )
    here = count // told.pop("machines")
    if gpus and here > gpus:
        notes.append(f"{here} processes on this machine are more than its {gpus} GPUs.")
    if gpus > 1 and count == 1:
        notes.append(
            "One process uses one GPU here, or all in transformers' DataParallel, which is slower: `accelerate launch` with a config of "
            "examples/accelerate starts one for each."
        )
    version = told.pop("version")
    how = "DDP" if count > 1 else "one process"
    if kind == "FSDP" and gpus:
        how = f"FSDP{version}"
    if kind == "DEEPSPEED" and gpus:
        how = f"DeepSpeed ZeRO-{version}"
    devices = (
        [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(min(here, gpus))] if gpus else ["cpu"] * here
    )
    return {
        "told_by": told["told_by"],
        "processes": count,
        "how": how,
        "backend": ("nccl" if gpus else "gloo") if count > 1 or how.startswith(("FSDP", "Deep")) else None,
        "devices": devices,
        "mixed_precision": told["mixed_precision"],
        "notes": notes,
    }


def _by_environment() -> dict[str, Any]:
    count = int(os.environ.get("WORLD_SIZE", 1))
    kind, version = "MULTI_GPU", None
    if _flag("ACCELERATE_USE_FSDP"):
        kind, version = "FSDP", os.environ.get("FSDP_VERSION", "1")
    elif _flag("ACCELERATE_USE_DEEPSPEED"):
        kind, version = "DEEPSPEED", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "?")
    return {
        "told_by": "the environment",
        "processes": count,
        "machines": max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", count))),
        "kind": kind,
        "version": version,
        "cpu": _flag("ACCELERATE_USE_CPU"),
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }


def _by_config() -> dict[str, Any]:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    told = {
        "told_by": "nothing: there is no config of Accelerate",
        "processes": 1,
        "machines": 1,
        "kind": "NO",
        "version": None,
        "cpu": _flag("ACCELERATE_USE_CPU"),
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }
    if not Path(default_config_file).is_file():
        return told
    try:
        config = load_config_from_file(None)
    except Exception as error:  # whatever its parser says
        raise ValueError(f"Accelerate's config {default_config_file} cannot be read: {error}") from error
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    version = None
    if kind == "FSDP":
        version = getattr(config, "fsdp_config", {}).get("fsdp_version", 1)
    elif kind == "DEEPSPEED":
        version = getattr(config, "deepspeed_config", {}).get("zero_stage", "?")
    return told | {
        "told_by": str(default_config_file),
        "processes": 1 if kind == "NO" else int(getattr(config, "num_processes", 1)),
        "machines": int(getattr(config, "num_machines", 1) or 1),
        "kind": kind,
        "version": version,
        "cpu": bool(config.use_cpu),
        "mixed_precision": config.mixed_precision or "no",
        "mpi": bool((getattr(config, "mpirun_config", None) or {}).get("mpirun_hostfile")),
    }


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
