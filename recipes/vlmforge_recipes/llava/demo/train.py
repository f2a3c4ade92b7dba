"""Train the demo model from scratch: `python -m vlmforge_recipes.llava.demo.train -o FOLDER`."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vlmforge_builder.tokenizer.convert import convert_tokenizer
from vlmforge_recipes.llava.demo.data import Batch, Conversations, batches
from vlmforge_recipes.llava.demo.model import DemoModel
from vlmforge_recipes.llava.demo.optimize import optimizers, rate
from vlmforge_recipes.llava.demo.plot import plot_losses
from vlmforge_recipes.llava.demo.spec import SPEC, Training
from vlmforge_recipes.llava.demo.text import corpus
from vlmforge_recipes.llava.demo.write import write_descriptions, write_weights
from vlmforge_recipes.llava.synthetic.tokenizer import train_tokenizer

LOG_EVERY = 20


@dataclass(frozen=True, slots=True)
class Row:
    """Mean cross entropies since the row before, and seconds since the start."""

    step: int
    words: float
    patches: float
    seconds: float


def train(folder: Path, training: Training, *, device: str, workers: int) -> Path:
    """Train with the random numbers of `training.seed` and write the checkpoint to `folder`."""
    torch.manual_seed(training.seed)
    write_descriptions(folder, SPEC, train_tokenizer(corpus(training.seed)))
    tokenizer = convert_tokenizer(folder).json.decode()
    model = DemoModel(SPEC).to(device)
    steps = batches(Conversations(training, SPEC.vision, tokenizer), workers)
    rows = _run(model, training, tqdm(steps, total=training.steps, unit="step"), device)
    write_weights(folder, model)
    _write_log(folder / "training_log.csv", rows)
    plot_losses(rows, folder / "training_loss.png")
    return folder


def _run(model: DemoModel, training: Training, steps: tqdm[Batch], device: str) -> list[Row]:
    chosen = optimizers(model, training)
    full = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    rows, sums, start = [], torch.zeros(2), time.monotonic()
    for step, batch in enumerate(steps):
        moved = batch.to(torch.device(device))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            words, patches = model.loss(moved)
        left = 1 - step / training.steps
        (words + training.patch_weight * left * patches).backward()  # type: ignore[no-untyped-call]
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, rated in zip(groups, full, strict=True):
            group["lr"] = rated * rate(step, training)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        sums += torch.stack((words, patches)).detach().cpu().float()
        if (step + 1) % LOG_EVERY == 0:
            means = sums / LOG_EVERY
            seconds = time.monotonic() - start
            rows.append(Row(step + 1, means[0].item(), means[1].item(), seconds))
            steps.set_postfix(words=f"{means[0]:.3f}", patches=f"{means[1]:.3f}")
            sums = torch.zeros(2)
    return rows


def _write_log(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([field.name for field in dataclasses.fields(Row)])
        for row in rows:
            table.writerow(
                [row.step, f"{row.words:.4f}", f"{row.patches:.4f}", f"{row.seconds:.0f}"]
            )


def main() -> None:
    """The command line."""
    defaults = Training()
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--workers", type=int, default=1, help="processes that draw the pictures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = dataclasses.replace(defaults, steps=args.steps, seed=args.seed)
    start = time.monotonic()
    train(args.out, training, device=args.device, workers=args.workers)
    print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes: {args.out}")
    print(f"next: build-engine {args.out} -o ENGINE && vlmforge eval ENGINE")


if __name__ == "__main__":
    main()
