"""Every gene deleted in turn against a naive loop, in one run: `python benchmarks/screen.py [DATA]`.

The naive loop is what the official software does for one cell: the masked-LM model with its head, float32, all hidden
states kept, edited cells built as Python lists, batches of 32. The model has V1-10M's shape and number of tokens, with
random weights.
Prints JSON: deletions per second and peak memory of the naive loop, of exact screens in float32 and bfloat16, and of
first order (a gene of a cell counts as a deletion); how far they agree; how cost grows with the length of cells and
their number; what share of the measured peak of matrix products the exact engine reaches; first order in embeddings of
the same cells; how many times the time of an exact `gfx.tl.screen_genes` a `gfx.tl.delete_genes` without controls takes
for the same deletions. Each is measured in a process of its own. About ten minutes on two cores; nothing else should
run.

With DATA, an h5ad file with raw counts and `var["ensembl_id"]`, such as pbmc3k, also the embedded model. First, whole
calls of a first-order screen of `--whole-cells` real cells (again and again the same ones) toward a goal: seconds,
those of its checks, and the time in embeddings of the same cells. Then exact results and estimates in `--cells` real
cells: gene means, single cells, and agreement as a screen estimates it from a sample of genes; half an hour on two
cores for 200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from bench_embed import SHAPES, matmul_peak, random_model
from scipy.stats import spearmanr

import gfx

NAIVE_BATCH = 32
LENGTHS = (128, 512, 1024, 2048)
#: Tokens of the real cells that are screened both ways.
LENGTHS_OF_AGREEMENT = (300, 680)
#: Exact screens: what is compared, and how precisely.
EXACT = tuple(
    "-".join(parts) for parts in itertools.product(("mean", "cls"), ("float32", "bfloat16"), ("keep", "close"))
)
#: Named deletions: how cells are compared, and where other genes stand.
NAMED = tuple("-".join(parts) for parts in itertools.product(("named",), ("mean", "cls"), ("keep", "close")))
#: Deletions that are timed: enough for a steady rate.
N_NAIVE, N_EXACT = 192, 512


# --- one contender, in a process of its own ------------------------------------------------------------------------


def make_cells(n_cells: int, length: int, vocabulary: object, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of as many tokens, genes drawn at random."""
    rng = np.random.default_rng(seed)
    genes = np.flatnonzero(~vocabulary.is_special)
    rows = [
        [vocabulary.cls, *rng.choice(genes, length - vocabulary.n_specials, replace=False), vocabulary.eos]
        for _ in range(n_cells)
    ]
    return np.array(rows, dtype=np.uint16), np.full(n_cells, length)


def naive(folder: Path, cell: list[int], places: range, positions: str) -> np.ndarray:
    """Delete genes from one cell as a plain script would; shifts of the mean and of `<cls>`, `(2, n_places)`."""
    import torch
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(folder, output_hidden_states=True).eval()
    shifts = []
    with torch.no_grad():
        before = model(input_ids=torch.tensor([cell])).hidden_states[-2]
        for start in range(0, len(places), NAIVE_BATCH):
            edited = [[*cell[:place], *cell[place + 1 :]] for place in places[start : start + NAIVE_BATCH]]
            given = {"input_ids": torch.tensor(edited)}
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            if positions == "keep":
                whole = range(len(cell))
                left = [[*whole[:place], *whole[place + 1 :]] for place in places[start : start + NAIVE_BATCH]]
                given["position_ids"] = torch.tensor(left)
            after = model(**given).hidden_states[-2]
            pairs = (before[:, 1:-1].mean(1), after[:, 1:-1].mean(1)), (before[:, 0], after[:, 0])
            shifts.append(np.stack([1 - torch.cosine_similarity(*pair).numpy() for pair in pairs]))
    return np.concatenate(shifts, axis=1)


def make_task(model: object, *, method: str, how: str, dtype: str, positions: str, goals: np.ndarray | None) -> object:
    """Screen all genes, up to the layer before the last."""
    from gfx._engine.run import Network
    from gfx._engine.tasks import Screen

    return Screen(
        network=Network(model.weights, model.config, model.n_layers - 1, dtype),
        vocabulary=model.vocabulary,
        is_exact=method == "exact",
        positions=positions,
        pooling=how,
        genes=~model.vocabulary.is_special,
        goals=goals,
        n_probes=0,
        seed=0,
    )


def run_here(task: object, cells: object) -> dict[str, np.ndarray]:
    """Run a task in this process, as the runner does."""
    from gfx._engine.device import choose_device

    return task.run(cells, choose_device())


def first_order_in_embeddings(task: object, cells: object) -> dict[str, float]:
    """Time a first-order screen toward one goal, and an embedding of the same cells."""
    from gfx._engine.tasks import CellEmbedding

    embedding = CellEmbedding(task.network, task.vocabulary, "cls")
    times = {}
    for name, run in (
        ("embedding", lambda: run_here(embedding, cells)),
        ("toward", lambda: run_here(task, cells)),
    ):
        run()
        start = time.perf_counter()
        run()
        times[name] = time.perf_counter() - start
    return {"embeddings_toward": times["toward"] / times["embedding"], "seconds_embedding": times["embedding"]}


def named_deletions(model: object, length: int, how: str, positions: str) -> dict[str, float]:
    """Time `tl.delete_genes` and an exact `tl.screen_genes` over the same deletions: genes of four equal cells."""
    vocabulary = model.vocabulary
    rng, ids = np.random.default_rng(0), vocabulary.ids.astype(str)
    genes = rng.choice(ids[np.char.startswith(ids, "ENSG")], length - vocabulary.n_specials, replace=False)
    counts = rng.integers(1, 100, (4, len(genes))).astype(np.float32)
    adata = ad.AnnData(counts, var=pd.DataFrame(index=genes))
    named = [*adata.var_names[: len(genes) // len(counts)]]
    chosen = {"model": model, "pooling": how, "positions": positions, "controls": None, "copy": True}
    times = {}
    for function in (gfx.tl.screen_genes, gfx.tl.delete_genes):
        function(adata, genes=named[:16], **chosen)  # loads the network
        start = time.perf_counter()
        function(adata, genes=named, **chosen)
        times[function.__name__] = time.perf_counter() - start
    delete, screen = times["delete_genes"], times["screen_genes"]
    n = len(named) * len(counts)
    return {"deletions": n, "seconds": delete, "seconds_screen": screen, "times_screen": delete / screen}


def measure(which: str, folder: Path, length: int, n_cells: int, result: Path) -> None:
    """Run one contender in this process."""
    import torch

    from gfx._core.screening import wanted_places
    from gfx._engine.run import CellBlock

    model = gfx.models.load(folder)
    vocabulary = model.vocabulary
    ids, lengths = make_cells(n_cells, length, vocabulary)
    told: dict[str, float] = {}
    if which in NAMED:
        told = named_deletions(model, length, *which.split("-")[1:])
        print(json.dumps(told | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    if which.startswith("naive"):
        places, positions = range(1, min(N_NAIVE, length - 2) + 1), which.partition("-")[2]
        naive(folder, ids[0].tolist(), places[:NAIVE_BATCH], positions)
        start = time.perf_counter()
        np.save(result, naive(folder, ids[0].tolist(), places, positions))
        told["deletions"] = len(places)
    else:
        is_exact = which != "first_order"
        method = "exact" if is_exact else "first_order"
        how, dtype, positions = which.split("-") if is_exact else ("cls", "float32", "keep")
        goals = np.random.default_rng(0).standard_normal((1, model.hidden_size))
        task = make_task(
            model,
            method=method,
            how=how,
            dtype=dtype,
            positions=positions,
            goals=goals if method == "first_order" else None,
        )
        wanted = wanted_places(ids, lengths, np.ones(len(vocabulary), dtype=bool), vocabulary)
        if method == "exact":
            wanted[:, 1 + max(1, N_EXACT * 512 // length // n_cells) :] = False  # longer ones take longer
        cells = CellBlock(np.arange(n_cells), ids, lengths, {"wanted": wanted})
        few = {"wanted": wanted[:1] & (np.arange(length) < 64)}
        run_here(task, CellBlock(cells.number[:1], ids[:1], lengths[:1], few))  # loads the network
        start = time.perf_counter()
        effects = run_here(task, cells)
        told["deletions"] = int(wanted.sum())
        of_cell = effects["cell"] == 0
        np.save(result, (effects["shift"] if method == "exact" else effects["toward"][:, 0])[of_cell])
    told["seconds"] = time.perf_counter() - start
    told["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if which == "first_order":
        told |= first_order_in_embeddings(task, cells)
    if which in EXACT:
        told["matmul_peak_gflops"] = matmul_peak(getattr(torch, dtype))
        told["gflops"] = deletion_gflop(model.config, length - 1, how, positions) * told["deletions"] / told["seconds"]
        told["share_of_peak"] = told["gflops"] / told["matmul_peak_gflops"]
    print(json.dumps(told))


def deletion_gflop(config: dict[str, int], length: int, how: str, positions: str) -> float:
    """Products of matrices that a deletion needs in all blocks but the last, as they are computed.

    The first block's projections are shared by all deletions of a cell, and where positions are held its attention
    follows from that of the whole cell; the last of these blocks needs no product of many rows where `<cls>` will do.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    attention, after = 4 * length**2 * width, 2 * length * width * (width + 2 * inner)
    project, n_layers = 6 * length * width**2, config["num_hidden_layers"] - 1
    n_whole = n_layers - 1 if how == "cls" else n_layers
    n_attended = n_whole - 1 if positions == "keep" else n_whole
    return 1e-9 * (n_whole * after + n_attended * attention + (n_whole - 1) * project)


def estimates_of_random_weights(folder: Path, n_cells: int = 2) -> dict[str, dict[str, float]]:
    """Compare estimates of shifts toward a goal with exact ones; mean over genes, as in the V1 family."""
    from gfx._core.screening import agreement as in_cell
    from gfx._engine.run import CellBlock

    model = gfx.models.load(folder)
    cells = CellBlock(np.arange(n_cells), *make_cells(n_cells, 512, model.vocabulary))
    goals = np.random.default_rng(0).standard_normal((1, model.hidden_size))
    told = {}
    for positions in ("keep", "close"):
        estimated, exact = (
            run_here(
                make_task(model, method=method, how="mean", dtype="float32", positions=positions, goals=goals), cells
            )
            for method in ("first_order", "exact")
        )
        each = np.array(
            [
                in_cell(*(effects["toward"][effects["cell"] == cell, 0] for effects in (estimated, exact)))
                for cell in range(n_cells)
            ]
        )
        told[positions] = {"cell_spearman": float(each[:, 0].mean()), "cell_precision": float(each[:, 1].mean())}
    return told


def run_alone(which: str, folder: Path, result: Path, *, length: int = 512, n_cells: int = 1) -> dict[str, float]:
    call = [sys.executable, __file__, "--measure", which, "--folder", str(folder), "--length", str(length)]
    call += ["--n-cells", str(n_cells), "--result", str(result)]
    out = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | {"GFX_VERBOSITY": "1"})
    told = json.loads(out.stdout.strip().splitlines()[-1])
    told["deletions_per_second"] = told["deletions"] / told["seconds"]
    return told


# --- the whole -----------------------------------------------------------------------------------------------------


def compare(folder: Path) -> dict[str, object]:
    random_model(folder / "model", SHAPES["V1-shape"])
    runs, found = {}, {}
    for which in ("naive-keep", "naive-close", *EXACT, "first_order"):
        result = folder / f"{which}.npy"
        runs[which] = run_alone(which, folder / "model", result, n_cells=32 if which == "first_order" else 1)
        found[which] = np.load(result)
    agree = {}
    for which in EXACT:
        how, dtype, positions = which.split("-")
        of_naive = found[f"naive-{positions}"][["mean", "cls"].index(how)]
        ours, precise = found[which], found[f"{how}-float32-{positions}"]
        there = ~np.isnan(precise)
        agree[which] = {
            "largest difference from naive": float(np.abs(ours[: len(of_naive)] - of_naive).max()),
            "mean shift of naive": float(of_naive.mean()),
        }
        if dtype == "bfloat16":
            agree[which]["Spearman with float32"] = float(spearmanr(ours[there], precise[there])[0])
    slow = {which: f"naive-{which.split('-')[2] if which in EXACT else 'keep'}" for which in (*EXACT, "first_order")}
    return {
        "model": "V1-10M's shape and number of tokens, random weights, 512 tokens a cell",
        "runs": runs,
        "times_naive": {
            which: runs[which]["deletions_per_second"] / runs[naive]["deletions_per_second"]
            for which, naive in slow.items()
        },
        "share_of_naive_memory": {
            which: runs[which]["peak_mb"] / runs[naive]["peak_mb"] for which, naive in slow.items()
        },
        "named": {which: run_alone(which, folder / "model", folder / "x.npy") for which in NAMED},
        "agreement": agree,
        "estimates": estimates_of_random_weights(folder / "model"),
        "by_length": {
            length: {
                which: run_alone(which, folder / "model", folder / "x.npy", length=length)["deletions_per_second"]
                for which in ("mean-float32-keep", "mean-bfloat16-keep")
            }
            for length in LENGTHS
        },
        "by_cells": {
            n: run_alone("mean-bfloat16-keep", folder / "model", folder / "x.npy", n_cells=n)["deletions_per_second"]
            for n in (1, 8)
        },
    }


def agreement(
    data: Path, n_cells: int, all_positions: list[str], probes: list[int], store: Path | None
) -> dict[str, object]:
    """Hold estimates of the embedded model against exact results in real cells."""
    adata = ad.read_h5ad(data)
    gfx.pp.tokenize(adata, model="mini", gene_ids="ensembl_id")
    n_tokens = (adata.obsm["gfx_tokens"] > 0).sum(axis=1)
    is_short = (n_tokens >= LENGTHS_OF_AGREEMENT[0]) & (n_tokens <= LENGTHS_OF_AGREEMENT[1])
    adata = adata[is_short].copy()  # exact results take their time
    types = adata.obs["cell_type"].astype(str)
    often = types.value_counts().index[:2]
    rows = np.flatnonzero(types == often[0])[:n_cells]
    keep = np.union1d(rows, np.flatnonzero(types == often[1])[:200])
    some = adata[keep].copy()
    some.obs["state"] = np.where(np.isin(keep, rows), "start", "goal")
    states = {"model": "mini", "groupby": "state", "start": "start", "goal": "goal", "controls": None}
    told: dict[str, object] = {"cells": len(rows), "start": often[0], "goal": often[1]}
    told["runs"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for positions, n_probes in itertools.product(all_positions, probes):
            if n_probes == probes[0]:
                kept = (Path(folder) if store is None else store) / positions
                exact, exact_seconds = screened(some, kept, positions=positions, **states)
            method = gfx.tl.FirstOrder(n_probes=n_probes)
            here = Path(folder) / f"{positions} {n_probes}"
            found, seconds = screened(some, here, method=method, positions=positions, **states)
            told["runs"][f"{positions}, {n_probes} probes"] = {
                "seconds": seconds,
                "exact_seconds": exact_seconds,
                **{measure: beside((exact, kept), (found, here), measure) for measure in ("shift", "toward")},
            }
    return told


def screened(adata: ad.AnnData, store: Path, **how: object) -> tuple[ad.AnnData, float]:
    start = time.perf_counter()
    found = gfx.tl.screen_genes(adata, store=store, copy=True, **how)
    return found, time.perf_counter() - start


def beside(exact: tuple[ad.AnnData, Path], found: tuple[ad.AnnData, Path], measure: str) -> dict[str, float]:
    """Spearman of gene means, and Spearman and precision in single cells, of all genes and of those a screen draws."""
    from gfx._core.screening import agreement as in_cell
    from gfx._core.screening import draw_checked

    tables = [adata.varm["gfx_screen"] for adata, _ in (exact, found)]
    often = tables[0]["n_cells"] >= 10
    means = [table.loc[often, f"{measure}_mean"] for table in tables]
    effects = [gfx.get.screen_cells(adata, store, measure=measure) for adata, store in (exact, found)]
    pairs = [(other.data, one.data) for one, other in zip(*effects, strict=True) if one.nnz]
    rng, drawn = np.random.default_rng(0), []
    for estimate, effect in pairs:
        weight = draw_checked(estimate[None], rng)
        drawn.append(in_cell(estimate, np.where(weight > 0, effect, np.nan), weight))
    cells, drawn = np.array([in_cell(*pair) for pair in pairs]), np.array(drawn)
    return {
        "gene_means_spearman": float(spearmanr(*means)[0]),
        "genes": int(often.sum()),
        "cell_spearman": float(cells[:, 0].mean()),
        "cell_precision": float(np.nanmean(cells[:, 1])),
        "cell_spearman_of_drawn_genes": float(drawn[:, 0].mean()),
        "cell_precision_of_drawn_genes": float(np.nanmean(drawn[:, 1])),
    }


def whole_call(data: Path, n_cells: int) -> dict[str, float]:
    """Time a first-order screen toward a goal from end to end, with and without random weights, and its checks."""
    from gfx.tl.screen import _run

    adata = ad.read_h5ad(data)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    start, goal = pd.Series(types).value_counts().index[:2]
    rows = [np.resize(np.flatnonzero(types == start), n_cells), np.flatnonzero(types == goal)[:200]]
    adata = adata[np.concatenate(rows)].copy()
    adata.obs_names = np.arange(adata.n_obs).astype(str)
    gfx.pp.tokenize(adata, model="mini", gene_ids="ensembl_id")
    gfx.tl.embed(adata[:32], model="mini", copy=True)  # loads what a first call loads
    told = {"cells": n_cells, "embedding": timed(gfx.tl.embed, adata, model="mini")}
    seconds = dict.fromkeys(("check_estimates", "run_candidates"), 0.0)

    def counting(name: str, function: object) -> object:
        def run(*given: object) -> object:
            begun = time.perf_counter()
            result = function(*given)
            seconds[name] = time.perf_counter() - begun
            return result

        return run

    for name in seconds:
        setattr(_run, name, counting(name, getattr(_run, name)))
    how = {"groupby": "cell_type", "start": start, "goal": goal, "method": gfx.tl.FirstOrder(n_probes=0)}
    for name, controls in (("screen", None), ("with_random_weights", "random_weights")):
        told[name] = timed(gfx.tl.screen_genes, adata, model="mini", controls=controls, **how)
        told |= {f"{name}_{check}": value for check, value in seconds.items()}
        told[f"{name}_in_embeddings"] = told[name] / told["embedding"]
    return told


def timed(function: object, *given: object, **how: object) -> float:
    start = time.perf_counter()
    function(*given, **how)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--positions", nargs="+", default=["keep", "close"])
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--store", type=Path, help="where the exact screen is kept; a stopped one goes on")
    parser.add_argument("--only-agreement", action="store_true", help="leave the timing out")
    parser.add_argument("--only-whole", action="store_true", help="time whole calls alone")
    parser.add_argument("--whole-cells", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--measure")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--n-cells", type=int, default=1)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.length, given.n_cells, given.result)
        return
    told: dict[str, object] = {}
    if given.data is not None and not given.only_agreement:
        told["whole"] = [whole_call(given.data, n_cells) for n_cells in given.whole_cells]
    if not (given.only_agreement or given.only_whole):
        with tempfile.TemporaryDirectory() as folder:
            told["speed"] = compare(Path(folder))
    if given.data is not None and not given.only_whole:
        told["agreement"] = agreement(given.data, given.cells, given.positions, given.probes, given.store)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
