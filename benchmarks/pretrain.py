"""Pretraining against a naive loop, in one run: `python benchmarks/pretrain.py [--size V1-10M] [--corpus DIR]`.

The naive loop is what one would write with transformers: every cell padded to all that the model reads, the whole
vocabulary scored at every position, float32, batches at random, AdamW. Ours is `gfx.models.pretrain`: batches of
similar length, scores only where a gene is masked, bfloat16 with float32 attention. Between them, to see what each
ingredient gives: the naive loop that scores only where a gene is masked, and ours in float32.

*Speed*: the same cells, start, number of steps, batch size, rate and schedule; time from the first batch to the end of
the last step, after a warm-up; what comes before stands beside it. *Loss*: of held-out cells after some passes with an
input of 64 tokens, for the naive loop takes too long on longer ones, judged by the same function on the same masked
genes, over several seeds, which set split, start, order and masking.

Cells are synthetic, of eight types, as uneven in detected genes as tissues are: log-normal around 700, at most 2,048
tokens; `--corpus` draws them from a folder of h5ad files with `var["ensembl_id"]`. Every measurement has a process of
its own. Prints JSON; seven minutes on a core, seconds with `--quick`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import torch
from scipy import sparse
from torch.nn.utils import clip_grad_norm_
from transformers import BertForMaskedLM, TrainerCallback, get_linear_schedule_with_warmup
from transformers.trainer import DEFAULT_CALLBACKS

import gfx
from gfx._engine.examples import NOTHING, MaskedCells
from gfx._engine.pretraining import DEFAULTS, MaskedGeneModel, masked_accuracy, read_model
from gfx.models._registry import CONFIGURATIONS
from gfx.models.pretraining._pretrain import _make_model, _split
from gfx.models.pretraining._shards import encode_sources
from gfx.models.pretraining._sources import find_sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx._core.vocabulary import Vocabulary
    from gfx.models.pretraining._shards import TokenShards

    Job = Mapping[str, Any]

NAIVE, NAIVE_SCORES, OURS_FLOAT32, OURS = "naive", "naive, scoring only masked genes", "gfx, float32", "gfx"
GOAL = 4.0
N_TYPES, TYPICAL_LENGTH = 8, 700
#: Scores of 32 cells at 2,048 positions for the whole vocabulary would take the naive loop 15 GB.
BATCH = 8
#: Of the model whose loss is compared.
LOSS_TOKENS = 64
QUICK_SIZE = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
WARM_UP_TOKENS = 32


# --- cells ---------------------------------------------------------------------------------------------------------


def synthetic_cells(n_cells: int, vocabulary: Vocabulary, longest: int, typical: int) -> ad.AnnData:
    """Counts of cells of several types: genes differ in abundance, the more abundant are detected more often.

    Eight times as many genes as a cell has at most are expressed at all, so that a few hundred cells teach about them.
    """
    rng = np.random.default_rng(0)
    expressed = rng.permutation(vocabulary.n_genes)[: 8 * longest]
    abundance = rng.normal(0, 1, len(expressed)) + rng.normal(0, 2, (N_TYPES, len(expressed)))
    n_detected = np.clip(rng.lognormal(np.log(typical), 0.5, n_cells), 10, longest - vocabulary.n_specials).astype(int)
    columns, counts = [], []
    for cell, n in enumerate(n_detected):
        own = abundance[cell % N_TYPES]
        found = np.argpartition(-(own + rng.gumbel(size=len(own))), n)[:n]  # drawn in proportion, without replacement
        columns.append(expressed[found])
        counts.append(1 + rng.poisson(np.exp(own[found])))
    x = sparse.csr_matrix(
        (np.concatenate(counts).astype(np.float32), np.concatenate(columns), np.cumsum([0, *n_detected])),
        shape=(n_cells, vocabulary.n_genes),
    )
    adata = ad.AnnData(x)
    adata.var["ensembl_id"] = vocabulary.ids[~vocabulary.is_special].astype(str)
    return adata


def write_cells(n_cells: int, folder: Path, vocabulary: Vocabulary, corpus: Path | None, longest: int) -> None:
    """Write the cells to train on and to hold out: synthetic ones, or some of the corpus, at random."""
    folder.mkdir()
    if corpus is None:
        typical = min(TYPICAL_LENGTH, longest // 3)
        synthetic_cells(n_cells, vocabulary, longest, typical).write_h5ad(folder / "synthetic.h5ad")
        return
    cells = {path.name: ad.read_h5ad(path) for path in sorted(corpus.glob("*.h5ad"))}
    first = np.cumsum([0, *(one.n_obs for one in cells.values())])
    rows = np.sort(np.random.default_rng(0).permutation(first[-1])[:n_cells])
    for (name, one), start in zip(cells.items(), first[:-1], strict=True):
        own = rows[(rows >= start) & (rows < start + one.n_obs)] - start
        if len(own):
            ad.AnnData(one.X[own], var=one.var[["ensembl_id"]]).write_h5ad(folder / name)


# --- the contenders ------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Time from the first batch to the end of the last step."""

    begin = end = 0.0
    steps = 0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.end = time.perf_counter()
        self.steps += 1


def padded_and_masked(
    rows: TokenShards, cells: Sequence[int], vocabulary: Vocabulary, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and labels as a collator for language models makes them: all to one width, 15 % to predict."""
    tokens = torch.full((len(cells), width), vocabulary.pad)
    for at, cell in enumerate(cells):
        row = rows[cell][:width]
        tokens[at, : len(row)] = torch.from_numpy(row.astype(np.int64))
    valid = (tokens != vocabulary.pad).long()
    special = torch.from_numpy(vocabulary.is_special)[tokens]
    chosen = (torch.rand(tokens.shape) < 0.15) & ~special
    labels = torch.where(chosen, tokens, NOTHING)
    fate = torch.rand(tokens.shape)
    tokens = torch.where(chosen & (fate < 0.8), vocabulary.mask, tokens)
    genes = torch.from_numpy(np.flatnonzero(~vocabulary.is_special))
    others = genes[torch.randint(len(genes), tokens.shape)]
    return torch.where(chosen & (fate >= 0.8) & (fate < 0.9), others, tokens), valid, labels


def train_naively(
    model: BertForMaskedLM, rows: TokenShards, cells: np.ndarray, width: int, *, vocabulary: Vocabulary, job: Job
) -> Clock:
    """Train as one would without gfx."""
    clock, n_steps = Clock(), job["passes"] * -(-len(cells) // BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=DEFAULTS["learning_rate"], weight_decay=DEFAULTS["weight_decay"]
    )
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(DEFAULTS["warmup_steps"] * n_steps), n_steps)
    torch.manual_seed(job["seed"])
    model.train()
    clock.on_train_begin()
    for _ in range(job["passes"]):
        for some in torch.randperm(len(cells)).split(BATCH):
            tokens, valid, labels = padded_and_masked(rows, cells[some.numpy()], vocabulary, width)
            model(input_ids=tokens, attention_mask=valid, labels=labels).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.on_step_end()
    return clock


def train_ours(folder: Path, vocabulary: Vocabulary, longest: int | None, job: Job, *, bf16: bool) -> Clock:
    clock = Clock()
    DEFAULT_CALLBACKS.append(clock)  # the only way to reach the Trainer that `pretrain` makes
    gfx.models.pretrain(
        sources(job),
        folder,
        vocabulary=vocabulary,
        gene_ids="ensembl_id",
        config=job["config"],
        curriculum=[(longest, job["passes"])],
        held_out=job["held_out"],
        training={
            "per_device_train_batch_size": BATCH,
            "bf16": bf16,
            "use_cpu": True,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        rng=job["seed"],
    )
    DEFAULT_CALLBACKS.remove(clock)
    return clock


def sources(job: Job) -> list[Path]:
    return sorted(Path(job["cells"]).glob("*.h5ad"))


def measure(which: str, job: Job, folder: Path) -> dict[str, Any]:
    """Run one contender in this process: how fast, how much memory, how good."""
    vocabulary = gfx.models.load("mini").vocabulary
    width = job["config"]["max_position_embeddings"]
    rows = encode_sources(find_sources(sources(job), "ensembl_id"), vocabulary, width, folder / "tokens")
    learnt, held = _split(len(rows), job["held_out"], job["seed"])
    start = partial(_make_model, vocabulary, job["config"], rows, learnt, coexpression=None, seed=job["seed"])
    held_cells = MaskedCells(rows, held, vocabulary, seed=job["seed"], hide_all=True)
    before = masked_accuracy(start(), held_cells)
    if which in {OURS, OURS_FLOAT32}:
        train = partial(train_ours, vocabulary=vocabulary, bf16=which == OURS)
        train(folder / "warm-up", longest=WARM_UP_TOKENS, job=job | {"passes": 1})
        begin = time.perf_counter()
        clock = train(folder, longest=None, job=job)
        trained = gfx.models.load(folder, vocabulary=vocabulary)
        model = read_model(trained.weights, trained.config)
    else:
        train = partial(train_naively, rows=rows, vocabulary=vocabulary)
        train(start(), cells=learnt[:BATCH], width=min(WARM_UP_TOKENS, width), job=job | {"passes": 1})
        begin = time.perf_counter()
        model = start()
        if which == NAIVE:
            model = plain(model)
        clock = train(model, cells=learnt, width=width, job=job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if which == NAIVE:
        trained, model = model, start()
        model.load_state_dict(trained.state_dict())
    return {
        "steps": clock.steps,
        "cells": job["passes"] * len(learnt),
        "tokens_a_cell": float(rows.lengths[learnt].mean()),
        "seconds_of_start": clock.begin - begin,
        "seconds_of_steps": clock.end - clock.begin,
        "peak_mb": peak,
        "before": before,
        "after": masked_accuracy(model, held_cells),
    }


def plain(model: MaskedGeneModel) -> BertForMaskedLM:
    """The same weights in the class that scores every position."""
    out = BertForMaskedLM(model.config)
    out.load_state_dict(model.state_dict())
    return out


# --- both parts ----------------------------------------------------------------------------------------------------


def run(which: str, job: Job) -> dict[str, Any]:
    """Measure in a process of its own, so that memory and warmth are its own; in this one if it must be quick."""
    with tempfile.TemporaryDirectory() as folder:
        if job["quick"]:
            with gfx.settings.override(verbosity=1):
                found = measure(which, job, Path(folder))
        else:
            call = [sys.executable, __file__, "--measure", which, "--job", json.dumps(job), "--folder", folder]
            environment = os.environ | {"GFX_VERBOSITY": "1"}
            out = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(out.stdout.strip().splitlines()[-1])
    print(json.dumps({which: found}), file=sys.stderr, flush=True)
    return found


def compare_speed(job: Job) -> dict[str, Any]:
    runs = {which: run(which, job) for which in (NAIVE, NAIVE_SCORES, OURS_FLOAT32, OURS)}
    rate = {which: one["cells"] / one["seconds_of_steps"] for which, one in runs.items()}
    return {
        "cells": runs[OURS]["cells"],
        "tokens_a_cell": round(runs[OURS]["tokens_a_cell"]),
        "input": job["config"]["max_position_embeddings"],
        "steps": runs[OURS]["steps"],
        "contenders": {
            which: {
                "cells_per_second": round(rate[which], 2),
                "times_naive": round(rate[which] / rate[NAIVE], 2),
                "seconds_of_start": round(one["seconds_of_start"], 2),
                "seconds_of_steps": round(one["seconds_of_steps"], 2),
                "peak_mb": round(one["peak_mb"]),
            }
            for which, one in runs.items()
        },
        "times_by_ingredient": {
            "scoring only masked genes": round(rate[NAIVE_SCORES] / rate[NAIVE], 2),
            "batches of similar length": round(rate[OURS_FLOAT32] / rate[NAIVE_SCORES], 2),
            "bfloat16 with float32 attention": round(rate[OURS] / rate[OURS_FLOAT32], 2),
        },
        "ratio": round(rate[OURS] / rate[NAIVE], 2),
        "goal": GOAL,
    }


def compare_loss(job: Job, n_seeds: int) -> dict[str, Any]:
    runs = {which: [run(which, job | {"seed": seed}) for seed in range(n_seeds)] for which in (NAIVE, OURS)}
    loss = {which: np.array([one["after"]["loss"] for one in some]) for which, some in runs.items()}
    apart = loss[OURS] - loss[NAIVE]
    return {
        "cells": runs[OURS][0]["cells"] // job["passes"],
        "passes": job["passes"],
        "input": job["config"]["max_position_embeddings"],
        "steps": runs[OURS][0]["steps"],
        "seeds": n_seeds,
        "held_out_loss_before": mean_and_sd([one["before"]["loss"] for one in runs[OURS]]),
        "held_out_loss": {which: mean_and_sd(values) for which, values in loss.items()},
        "held_out_top_10": {
            which: mean_and_sd([one["after"]["top_10"] for one in some]) for which, some in runs.items()
        },
        "difference": mean_and_sd(apart),
        # Seeds differ in split and start as well, the same for both: what counts is the difference within each.
        "within_noise": bool(abs(apart.mean()) <= 2 * apart.std(ddof=1) / len(apart) ** 0.5) if n_seeds > 1 else None,
    }


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "sd": round(float(np.std(values)), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="mini", choices=sorted(CONFIGURATIONS))
    parser.add_argument(
        "--corpus", type=Path, help="folder of h5ad files to draw cells from; synthetic cells if left out"
    )
    parser.add_argument("--input", type=int, default=2048, help="tokens that the model reads, where speed is measured")
    parser.add_argument(
        "--cells", type=int, default=160, help="to measure speed with; fewer have no batches of similar length"
    )
    parser.add_argument("--loss-cells", type=int, default=512, help="to compare the loss with")
    parser.add_argument("--passes", type=int, default=4, help="over these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model on a few short cells: does it run?")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.job, given.folder)))
        return
    config = CONFIGURATIONS[given.size] | {"max_position_embeddings": given.input}
    if given.quick:
        given.cells, given.loss_cells, given.passes, given.seeds = 16, 32, 1, 2
        config |= QUICK_SIZE | {"max_position_embeddings": 96}
    shorter = config | {"max_position_embeddings": min(LOSS_TOKENS, config["max_position_embeddings"])}
    vocabulary = gfx.models.load("mini").vocabulary
    n_held = {"speed": BATCH, "loss": given.loss_cells}
    with tempfile.TemporaryDirectory() as temporary:
        jobs = {}
        for part, n, passes, sized in (
            ("speed", given.cells, 1, config),
            ("loss", given.loss_cells, given.passes, shorter),
        ):
            cells = Path(temporary) / part
            total = n + n_held[part]
            write_cells(total, cells, vocabulary, given.corpus, sized["max_position_embeddings"])
            jobs[part] = {
                "cells": str(cells),
                "config": sized,
                "passes": passes,
                "quick": given.quick,
                "held_out": n_held[part] / total,
                "seed": 0,
            }
        report = {
            "benchmark": "pretraining",
            "size": "tiny" if given.quick else given.size,
            "from": "synthetic" if given.corpus is None else given.corpus.name,
            "genes": vocabulary.n_genes,
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "speed": compare_speed(jobs["speed"]),
            "loss": compare_loss(jobs["loss"], given.seeds),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
