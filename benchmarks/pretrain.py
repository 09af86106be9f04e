"""Our contrastive training step beside open_clip's own.

    python benchmarks/pretrain.py [--quick] [--json PATH] [--device cpu|cuda] [--models NAME ...] [--batch N] [--apart]

    step <model>        one optimizer step on batches in memory, samples/s
    end to end <model>  the same from the shipped tars, decoding and tokenizing included, samples/s
    memory <model>      peak of one process that makes some steps: resident memory on a CPU, allocated on a GPU
    mfu <model>         on a GPU: operations that each side computes over the device's dense peak

Captions have the lengths of web captions (a lognormal law, median 12 tokens), or are the pool's own. open_clip runs as
its `open_clip_train.main` does: `create_model`, `ClipLoss`, autocast to bf16, AdamW with its groups and numbers, images
normalised and captions padded to 77 by its loader. Ours is the stage's engine with the same numbers and
`text_packing`; where open_clip's module computes (RN50), captions are cut behind the longest one. The two make their
steps in turn, in one process, on the same pictures and captions, so that a busy machine slows both alike. A SigLIP
learns by `SigLipLoss` and our `siglip`, from random tokens only, as its tokenizer is on the hub; its captions are 64
tokens long on both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tables import Row, faster, print_header, print_row, smaller, write_rows

from mmfoundry.data.loader import Loader, Source
from mmfoundry.data.pairs import PairEncoder, pad_text
from mmfoundry.models.clip import CLIP, ClipConfig
from mmfoundry.models.flops import FORWARD_AND_BACKWARD, clip_work
from mmfoundry.models.interop.any_clip import AnyClip, AnyClipConfig, config_of_name
from mmfoundry.models.objectives import OBJECTIVES
from mmfoundry.models.open_clip_model import OpenClip as OpenClipModule
from mmfoundry.models.param_groups import clip_param_groups
from mmfoundry.pipeline.distributed import Runtime, init_runtime
from mmfoundry.pipeline.engine import Engine
from mmfoundry.pipeline.engine_config import EngineConfig
from mmfoundry.pipeline.gauges import peak_tflops
from mmfoundry.pipeline.host_memory import keep_freed_memory
from mmfoundry.pipeline.optimizers import OptimizerConfig, build_optimizer
from mmfoundry.pipeline.torchvision_ops import declare_missing_ops

Batch = dict[str, torch.Tensor]

ROOT = Path(__file__).resolve().parents[1]
POOL = sorted((ROOT / "data" / "samples").glob("pool-*.tar"))
OPTIMIZER = OptimizerConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)  # open_clip's for a ViT
WORKERS = 2
WORK_WIDTH = 28  # of the table's first column
WARM_UP = 1  # steps of each side that are not counted


def web_batch(config: AnyClipConfig, rows: int, seed: int) -> Batch:
    """Random pictures, and token ids of captions whose lengths follow a lognormal law; padded to the context."""
    generator = torch.Generator().manual_seed(seed)
    side, vocabulary, context = config.vision_cfg.image_size, config.text_cfg.vocab_size, config.text_cfg.context_length
    image = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator)
    words = torch.exp(2.5 + 0.65 * torch.randn(rows, generator=generator)).round()  # e^2.5: 12 tokens
    length = words.long().clamp(1, context - 2) + 2  # start and end
    text = torch.randint(1, vocabulary - 2, (rows, context), generator=generator)
    text[:, 0] = vocabulary - 2
    position = torch.arange(context)
    text[position[None] >= length[:, None]] = 0
    text[torch.arange(rows), length - 1] = vocabulary - 1
    return {"image": image, "text": text}


def is_plain(config: AnyClipConfig) -> bool:
    """Whether a model is one of our own towers that reads captions by CLIP's tokenizer up to their end."""
    return isinstance(config, ClipConfig) and not config.text_cfg.reads_padding


class Ours:
    """The engine of the pretrain stage."""

    def __init__(self, config: AnyClipConfig, rows: int, runtime: Runtime) -> None:
        self.device = runtime.device
        self.model: AnyClip
        if isinstance(config, ClipConfig):
            self.model = CLIP.from_seed(config, 0)
            self.model.text_model.packed = is_plain(config)
        else:
            self.model = OpenClipModule.from_seed(config, 0)
        self.model.to(self.device).train()
        self._trims = self.model.trims if isinstance(self.model, OpenClipModule) else is_plain(config)
        groups = clip_param_groups(self.model, OPTIMIZER.weight_decay)
        settings = EngineConfig(train_batch_size=rows, precision="bf16", gradient_clipping=0)
        objective = OBJECTIVES["info_nce" if config.init_logit_bias is None else "siglip"]
        self._engine = Engine(
            settings, self.model, objective, lambda each: build_optimizer(each, OPTIMIZER), groups, runtime
        )

    def prepare(self, batch: Batch) -> Batch:
        """As our loader hands it out: cut behind the longest caption, where the tower does not read on."""
        longest = int(batch["text"].argmax(1).max()) + 1 if self._trims else None
        return {"image": batch["image"].to(self.device), "text": batch["text"][:, :longest].to(self.device)}

    def step(self, batch: Batch) -> None:
        """One optimizer step, and the checks that every step of ours makes, on the device."""
        values = self._engine.accumulate(batch)
        self._engine.step(1.0, values["loss"].isfinite())

    def flops(self, batch: Batch) -> float:
        """What a step of our own towers computes."""
        assert isinstance(self.model, CLIP)
        return clip_work(self.model)(batch).flops


class OpenClip:
    """open_clip's own parts, put together as `open_clip_train.main` does."""

    def __init__(self, name: str, config: AnyClipConfig, device: torch.device) -> None:
        declare_missing_ops()
        import open_clip
        from open_clip.loss import ClipLoss, SigLipLoss

        self.device, self._config = device, config
        self._model = open_clip.create_model(name, precision="amp_bf16", device=device).train()
        sigmoid = config.init_logit_bias is not None
        self._loss = SigLipLoss() if sigmoid else ClipLoss(local_loss=False, gather_with_grad=True, cache_labels=True)
        named = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        spared = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        rest = [p for _, p in named if all(p is not each for each in spared)]
        groups = [{"params": spared, "weight_decay": 0.0}, {"params": rest, "weight_decay": OPTIMIZER.weight_decay}]
        betas = (OPTIMIZER.betas[0], OPTIMIZER.betas[1])
        self._optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=betas, eps=OPTIMIZER.eps)

    def prepare(self, batch: Batch) -> Batch:
        """As its loader hands it out: normalised, padded."""
        preprocess = self._config.preprocess_cfg
        mean, std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
        image = (batch["image"] / 255 - mean) / std
        return {"image": image.to(self.device), "text": batch["text"].to(self.device)}

    def step(self, batch: Batch) -> None:
        """`train_one_epoch`, one turn of it."""
        self._optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            said = self._model(batch["image"], batch["text"])  # a bias behind the scale, where the loss is sigmoid
            loss = self._loss(*said)
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, 4.6052)
        if not torch.isfinite(loss):
            raise RuntimeError("not finite")

    def flops(self, batch: Batch) -> float:
        """What a step computes: every position of every block, at 77 tokens."""
        assert isinstance(self._config, ClipConfig)
        vision, text = self._config.vision_cfg, self._config.text_cfg
        total = 0
        for tower, positions in ((vision, vision.num_patches + 1), (text, text.context_length)):
            width = tower.width
            block = positions * (8 * width**2 + 4 * positions * width + 4 * width * int(width * tower.mlp_ratio))
            total += tower.layers * block + 2 * width * self._config.embed_dim
        patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.width
        return len(batch["text"]) * (FORWARD_AND_BACKWARD * total + (FORWARD_AND_BACKWARD - 1) * patches)


def our_batches(config: AnyClipConfig, rows: int, device: torch.device) -> Iterator[Batch]:
    """Our loader over the pool."""
    loader = Loader(
        [Source(list(map(str, POOL)), 1.0)],
        batch_size=rows,
        encode=PairEncoder(config.vision_cfg.image_size, config.text_cfg.context_length),
        finish=pad_text,
        num_workers=WORKERS,
        max_unreadable=0.1,
        device=device,
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:
        batches.close()  # type: ignore[attr-defined]


def their_batches(config: AnyClipConfig, rows: int, device: torch.device) -> Iterator[Batch]:
    """open_clip's pipeline over the pool, as `get_wds_dataset` builds it with resampling; its own loader class fails
    with webdataset 1."""
    import webdataset as wds
    from open_clip import AugmentationCfg, SimpleTokenizer, image_transform

    transform = image_transform(config.vision_cfg.image_size, is_train=True, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    tokenizer = SimpleTokenizer()
    dataset = wds.DataPipeline(
        wds.ResampledShards(list(map(str, POOL))),
        wds.tarfile_to_samples(handler=wds.ignore_and_continue),
        wds.select(lambda sample: "txt" in sample and any(each in sample for each in ("jpg", "png", "jpeg", "webp"))),
        wds.decode("pilrgb", handler=wds.ignore_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(rows, partial=False),
    )
    for image, text in wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=WORKERS):
        yield {"image": image.to(device, non_blocking=True), "text": text.to(device, non_blocking=True)}


def timed(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_model(name: str, rows: int, steps: int, device: str) -> Iterator[Row]:
    """All rows of one model, each as soon as it is measured."""
    config = config_of_name(name)
    runtime = init_runtime()
    ours, peer = Ours(config, rows, runtime), OpenClip(name, config, runtime.device)
    yield from step_rows(name, ours, peer, config, rows, steps)
    if config.text_cfg.hf_tokenizer_name is None:
        turns: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(1 if steps < 4 else 2):
            turns["ours"].append(seconds_from_tars(ours, our_batches(config, rows, ours.device), steps))
            turns["peer"].append(seconds_from_tars(peer, their_batches(config, rows, ours.device), steps))
        yield end_to_end_row(name, turns, rows)
    del ours, peer  # what is measured next has to fit beside this process
    yield memory_row(name, rows, device)


def measure_apart(name: str, rows: int, steps: int, device: str) -> Iterator[Row]:
    """The rows of a model of which two do not fit into memory: each side in a process of its own, one after another."""
    turns: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(1 if steps < 4 else 2):
        for side, seconds in turns.items():
            seconds.append(of_a_process(name, rows, device, "--seconds-of", side, "--steps", str(steps)))
    yield end_to_end_row(name, turns, rows)
    yield memory_row(name, rows, device)


def step_rows(name: str, ours: Ours, peer: OpenClip, config: AnyClipConfig, rows: int, steps: int) -> list[Row]:
    """Steps on batches in memory, the sides in turn."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    flops: dict[str, list[float]] = {"ours": [], "peer": []}
    sides: dict[str, Ours | OpenClip] = {"ours": ours, "peer": peer}
    counted = ours.device.type == "cuda" and is_plain(config)
    for index in range(steps + WARM_UP):
        batch = web_batch(config, rows, seed=index)
        for side in ("ours", "peer") if index % 2 else ("peer", "ours"):
            ready = sides[side].prepare(batch)
            times[side].append(timed(sides[side].step, ready, ours.device))
            if counted:
                flops[side].append(sides[side].flops(ready))
    seconds = {side: statistics.median(each[WARM_UP:]) for side, each in times.items()}
    found = [faster(f"step {name}", rows / seconds["ours"], rows / seconds["peer"], "samples/s")]
    if counted:
        peak = peak_tflops(torch.cuda.get_device_name(), "bf16")
        if peak is not None:
            share = {side: statistics.mean(flops[side]) / seconds[side] / peak / 1e10 for side in seconds}
            found.append(faster(f"mfu {name}", share["ours"], share["peer"], "%"))
    return found


def seconds_from_tars(side: Ours | OpenClip, batches: Iterator[Batch], steps: int) -> float:
    """Seconds of a step from the tars: one side's loader and steps alone."""
    timed(side.step, next(batches), side.device)  # starts the workers
    start = time.perf_counter()
    for _ in range(steps):
        timed(side.step, next(batches), side.device)
    seconds = (time.perf_counter() - start) / steps
    batches.close()  # type: ignore[attr-defined]
    return seconds


def end_to_end_row(name: str, turns: dict[str, list[float]], rows: int) -> Row:
    """Of the turns of each side, in seconds a step, the better."""
    return faster(f"end to end {name}", rows / min(turns["ours"]), rows / min(turns["peer"]), "samples/s")


def memory_row(name: str, rows: int, device: str) -> Row:
    """Peak memory of a process of each side's own, one after the other."""
    peaks = {side: of_a_process(name, rows, device, "--peak-of", side) for side in ("ours", "peer")}
    return smaller(f"memory {name}", peaks["ours"], peaks["peer"], "MB", digits=1)


def of_a_process(name: str, rows: int, device: str, *asked: str) -> float:
    """The number that this script prints, started again for one side."""
    command = [sys.executable, __file__, "--device", device, "--models", name, "--batch", str(rows), *asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures {' '.join(asked)} ended with {done.returncode}")
    return float(done.stdout.split()[-1])


def alone(side: str, name: str, rows: int) -> tuple[Ours | OpenClip, AnyClipConfig]:
    """One side, in a process of its own."""
    config, runtime = config_of_name(name), init_runtime()
    return (Ours(config, rows, runtime) if side == "ours" else OpenClip(name, config, runtime.device)), config


def print_seconds(side: str, name: str, rows: int, steps: int) -> None:
    """Print the seconds of a step from the tars."""
    trained, config = alone(side, name, rows)
    batches = (our_batches if side == "ours" else their_batches)(config, rows, trained.device)
    print(seconds_from_tars(trained, batches, steps))


def print_peak(side: str, name: str, rows: int) -> None:
    """Make steps, and print the peak in MB."""
    trained, config = alone(side, name, rows)
    for seed in range(2):
        trained.step(trained.prepare(web_batch(config, rows, seed)))
    on_gpu = trained.device.type == "cuda"
    print((torch.cuda.max_memory_allocated() if on_gpu else most_resident_bytes()) / 1e6)


def most_resident_bytes() -> int:
    """The most memory this process held; getrusage would also count what its starter held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer steps")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", help="open_clip's names")
    parser.add_argument("--batch", type=int, help="pairs of a step")
    parser.add_argument("--steps", type=int, help="timed steps of each side")
    parser.add_argument(
        "--apart", action="store_true", help="end to end and memory only, each side in a process of its own"
    )
    parser.add_argument("--peak-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    on_gpu = arguments.device == "cuda"
    models = arguments.models or (
        ["ViT-B-32", "ViT-B-16", "ViT-L-14"] if on_gpu else ["ViT-S-32-alt"] if arguments.quick else ["ViT-B-32"]
    )
    batch = arguments.batch or (256 if on_gpu else 16 if arguments.quick else 32)
    if arguments.peak_of:
        print_peak(arguments.peak_of, models[0], batch)
        return
    steps = arguments.steps or (20 if on_gpu else 3 if arguments.quick else 8)
    if arguments.seconds_of:
        print_seconds(arguments.seconds_of, models[0], batch, steps)
        return
    measure = measure_apart if arguments.apart else measure_model
    rows = []
    print_header(WORK_WIDTH, peer="open_clip", note=f"   (batch {batch})")
    for row in (row for name in models for row in measure(name, batch, steps, arguments.device)):
        print_row(row, WORK_WIDTH)
        rows.append(row)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
