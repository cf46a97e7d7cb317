"""Whether predicted expression tells labelled regions apart as well as measured expression does.

Two questions, asked of what was measured and of each model's prediction at the same spots: how well a multinomial
logistic regression finds a spot's label where it was not fitted, and how far clusters of spots agree with the labels,
as the papers of rivals report it. scikit-learn comes with ``pip install 'hifusion[labels]'``.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hifusion import files
from hifusion.errors import InputError, plain
from hifusion.evaluated import find_predictions, rank
from hifusion.metrics import constant
from hifusion.section import LABEL, read_section

NO_REGION = ("undetermined",)  # her2st: spots of which the pathologist did not say what they are
MEASURED, MAJORITY = "measured", "majority"  # rows beside the models: what was measured; the commonest label, the null
MOST_FOLDS, INNER_FOLDS = 8, 3
PENALTIES = (0.001, 0.01, 0.1)  # C of the regression, strongest penalty first, chosen in the inner folds
LEAST_SPOTS = 5  # a label of fewer spots cannot be learned and tested
BLOCK_PITCHES = 3  # side of the blocks that spots of a single section are held out in, as in training

Progress = Callable[[str, int, int], None]  # (what is scored, how many done, how many in all)
_Folds = list[tuple[np.ndarray, np.ndarray]]  # rows to fit on, rows to test


class _Labelled(NamedTuple):
    """The labelled spots of an evaluation; all arrays and rows of a name in the same order."""

    expressions: dict[str, np.ndarray]  # measured, then each model: (N, G)
    labels: np.ndarray
    sections: np.ndarray
    patients: np.ndarray
    blocks: np.ndarray


def separation(
    expressions: Mapping[str, np.ndarray],
    labels: Sequence[str | None] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    blocks: Sequence[str] | np.ndarray | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How well labels are found from expression in groups that were left out, a row per name and one for the null.

    The regression (genes standardised, labels weighted to count alike) is fitted on all groups but some and tested
    on those, at most eight times; its penalty is chosen by balanced accuracy in three inner folds of the groups it is
    fitted on. All rows have the same folds. ``majority`` always says the commonest label of the other groups.

    Parameters
    ----------
    expressions
        Name -> expression of the same spots, ``(N, G)``; G may differ.
    labels
        ``(N,)``; spots without one, "undetermined" ones, and labels of fewer than five spots or of a single group are
        left out.
    groups
        ``(N,)``: what is held out together: patients, sections or, within one section, blocks.
    blocks
        ``(N,)``: what inner folds hold out together where all fitted spots are of one group; spots singly where None.

    Returns
    -------
    pandas.DataFrame
        ``model``; ``balanced_accuracy`` (mean recall over labels) and ``macro_f1`` of all tested spots pooled;
        ``macro_auc``, one label against the rest, averaged over folds, then labels; ``n_spots, n_labels, n_folds``.

    Raises
    ------
    InputError
        Values that do not fit together or are not finite, fewer than two labels or groups, no scikit-learn.
    """
    _scikit_learn()
    tables = {name: np.asarray(values, dtype=np.float64) for name, values in expressions.items()}
    names, where = np.array(labels, dtype=object), np.asarray(groups).astype(str)
    for name, values in tables.items():
        if values.ndim != 2 or not len(values) == len(names) == len(where) or not np.isfinite(values).all():
            raise InputError(
                f"expression of {plain(name)} is {values.shape} for {len(names)} labels and {len(where)} groups; give "
                "finite numbers (N, G) and a label and a group for each of the N spots"
            )
    kept = _usable(names, where)
    if not kept.any():
        raise InputError(
            f"no two labels stand in two groups with {LEAST_SPOTS} spots each; label more spots, or sections"
        )
    known, y = np.unique(names[kept].astype(str), return_inverse=True)
    within = np.arange(len(names)) if blocks is None else np.asarray(blocks)
    outer = _folds(where[kept], within[kept], MOST_FOLDS)
    inner = [_folds(where[kept][fit], within[kept][fit], INNER_FOLDS) for fit, _ in outer]
    rows = []
    for done, (name, values) in enumerate(tables.items()):
        if progress:
            progress(f"labels {name}", done, len(tables))
        rows.append({"model": name, **_scores(_found(values[kept], y, len(known), outer, inner), y, outer)})
    share = np.zeros((len(y), len(known)))
    for fit, test in outer:
        share[test] = np.bincount(y[fit], minlength=len(known)) / len(fit)
    rows.append({"model": MAJORITY, **_scores(share, y, outer)})
    return pd.DataFrame(rows).assign(n_spots=len(y), n_labels=len(known), n_folds=len(outer))


def clustering(
    expression: np.ndarray, labels: Sequence[str | None] | np.ndarray, sections: Sequence[str] | np.ndarray
) -> tuple[float, float]:
    """Agreement (ARI, NMI) of clusters with labels: k-means per section, k its number of labels; mean over sections.

    Nothing is held out and k is told, as in the papers that report it. Spots without a label are left out, sections
    with fewer than two labels too (NaN where none is left); a constant map is one cluster and agrees with nothing: 0.

    Parameters
    ----------
    expression
        ``(N, G)``, clustered as it is.
    labels, sections
        ``(N,)`` each.
    """
    sk = _scikit_learn()
    names, where = np.array(labels, dtype=object), np.asarray(sections).astype(str)
    told, scores = _has_region(names), []
    for section in np.unique(where):
        rows = told & (where == section)
        truth = names[rows].astype(str)
        k = len(np.unique(truth))
        if k < 2:
            continue
        values = np.asarray(expression, dtype=np.float64)[rows]
        values = values[:, ~constant(values)]
        distinct = len(np.unique(values, axis=0))
        if distinct < 2:
            scores.append((0.0, 0.0))
            continue
        found = sk.cluster.KMeans(min(k, distinct), n_init=10, random_state=0).fit_predict(values)
        scores.append(
            (sk.metrics.adjusted_rand_score(truth, found), sk.metrics.normalized_mutual_info_score(truth, found))
        )
    ari, nmi = np.mean(scores, axis=0) if scores else (np.nan, np.nan)
    return float(ari), float(nmi)


def label_report(folder: Path, progress: Progress | None = None) -> pd.DataFrame:
    """Score measured expression, every model of an evaluation and the null on its labelled sections; ``labels.csv``.

    Patients are held out where two or more have labelled sections, else sections, else blocks of 3 x 3 pitches of the
    one section; the column ``folds`` says which. Genes are those that the panels of all these sections share, and each
    is standardised within its section first: a patient's own level would else hide the pattern.

    Returns
    -------
    pandas.DataFrame
        The columns of :func:`separation`; ``of_measured``, the part of the measured expression's balanced accuracy
        above chance (one over the number of labels) that a row reaches; ``ari, nmi`` of :func:`clustering`; ``folds,
        n_sections, n_genes``.

    Raises
    ------
    InputError
        No predictions or no labels in the folder, too few labels, no scikit-learn.
    """
    folder = Path(folder)
    _scikit_learn()
    spots = _read(folder)
    kinds = {"patients": spots.patients, "sections": spots.sections, "blocks": spots.blocks}
    folds = next((kind for kind, of in kinds.items() if len(np.unique(of)) > 1), "blocks")
    scaled = {name: within_sections(values, spots.sections) for name, values in spots.expressions.items()}
    table = separation(scaled, spots.labels, kinds[folds], blocks=spots.blocks, progress=progress)
    chance = 1 / table["n_labels"]
    above = table["balanced_accuracy"] - chance
    table["of_measured"] = above / above.iloc[0] if above.iloc[0] > 0 else np.nan
    agreement = {name: clustering(values, spots.labels, spots.sections) for name, values in spots.expressions.items()}
    agreement[MAJORITY] = (0.0, 0.0)  # one cluster
    table[["ari", "nmi"]] = [agreement[name] for name in table["model"]]
    table["folds"] = folds
    table["n_sections"] = len(np.unique(spots.sections))
    table["n_genes"] = spots.expressions[MEASURED].shape[1]
    files.write_text(folder / "labels.csv", table.to_csv(index=False))
    return table


def within_sections(expression: np.ndarray, sections: Sequence[str] | np.ndarray) -> np.ndarray:
    """Each gene less its mean over the section and over its standard deviation there, ``(N, G)``; 0 where constant."""
    values, where = np.array(expression, dtype=np.float64), np.asarray(sections).astype(str)
    for section in np.unique(where):
        own = values[where == section]
        flat = constant(own)
        scaled = (own - own.mean(axis=0)) / np.where(flat, 1.0, own.std(axis=0))
        values[where == section] = np.where(flat, 0.0, scaled)
    return values


def _read(folder: Path) -> _Labelled:
    found = find_predictions(folder)
    models = sorted({label for _, label in found}, key=rank)
    everywhere = [name for name, _ in found if all((name, label) in found for label in models)]
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in (MEASURED, *models)}
    spots: list[pd.DataFrame] = []
    for name in dict.fromkeys(everywhere):
        first = read_section(found[name, models[0]])
        if LABEL not in first.obs or not _has_region(first.obs[LABEL].to_numpy(dtype=object)).any():
            continue
        if MEASURED not in first.layers:
            raise InputError(f"{found[name, models[0]]}: holds no layers['measured']; give a folder of an evaluation")
        parts[MEASURED].append(first.to_df(MEASURED))
        for label in models:
            predicted = read_section(found[name, label])
            if list(predicted.obs_names) != list(first.obs_names):
                raise InputError(f"{found[name, label]}: other spots than {found[name, models[0]]}; evaluate anew")
            parts[label].append(predicted.to_df())
        facts, centres = first.uns["hifusion"], first.obsm["spatial"]
        side_px = BLOCK_PITCHES * facts["pitch_um"] / facts["mpp"]
        block = np.floor((centres - centres.min(axis=0)) / side_px).astype(int)
        spots.append(
            pd.DataFrame(
                {
                    "label": first.obs[LABEL].to_numpy(dtype=object),
                    "section": name,
                    "patient": facts["patient"],
                    "block": [f"{name} {x} {y}" for x, y in block],
                }
            )
        )
    if not spots:
        raise InputError(
            f"{folder}: none of its sections is labelled; evaluate sections with obs['label'] (her2st: "
            "data/ST-pat/lbl in the raw folder before `hifusion prepare`)"
        )
    genes = set.intersection(*(set(part.columns) for its in parts.values() for part in its))
    if not genes:
        raise InputError(f"{folder}: the panels of its labelled sections share no gene; evaluate with one panel")
    order = [gene for gene in parts[MEASURED][0].columns if gene in genes]
    all_spots = pd.concat(spots)
    columns = {column: all_spots[column].to_numpy(dtype=object) for column in all_spots}
    return _Labelled(
        {name: np.concatenate([part[order].to_numpy() for part in its]) for name, its in parts.items()},
        columns["label"],
        columns["section"],
        columns["patient"],
        columns["block"],
    )


def _has_region(labels: np.ndarray) -> np.ndarray:
    return np.array([not pd.isna(label) and label not in NO_REGION for label in labels], dtype=bool)


def _usable(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Spots whose label can be learned in one group and tested in another, bool ``(N,)``; none for a single label."""
    told = pd.DataFrame({"label": labels, "group": groups})[_has_region(labels)]
    its = told.groupby("label")["group"].agg(["size", "nunique"])
    good = its.index[(its["size"] >= LEAST_SPOTS) & (its["nunique"] > 1)]
    return np.array([label in good for label in labels], dtype=bool) & (len(good) > 1)


def _folds(groups: np.ndarray, within: np.ndarray, most: int) -> _Folds:
    """Folds that keep groups whole; where there is one group, the parts ``within`` it; where there is one, spots."""
    sk = _scikit_learn()
    parts = next(these for these in (groups, within, np.arange(len(groups))) if len(np.unique(these)) > 1)
    splitter = sk.model_selection.GroupKFold(min(most, len(np.unique(parts))))
    return list(splitter.split(parts, groups=parts))


def _found(values: np.ndarray, y: np.ndarray, n: int, outer: _Folds, inner: Sequence[_Folds]) -> np.ndarray:
    """Probability of each label at each spot, ``(N, n)``, from regressions that did not see the spot's group."""
    probability = np.zeros((len(y), n))
    for (fit, test), folds in zip(outer, inner, strict=True):
        scores = []
        for penalty in PENALTIES:
            tried = np.zeros((len(fit), n))
            for inner_fit, inner_test in folds:
                tried[inner_test] = _regress(
                    values[fit][inner_fit], y[fit][inner_fit], values[fit][inner_test], n, penalty
                )
            scores.append(_balanced_accuracy(tried.argmax(axis=1), y[fit]))
        best = PENALTIES[int(np.argmax(scores))]  # the strongest of equal ones
        probability[test] = _regress(values[fit], y[fit], values[test], n, best)
    return probability


def _regress(x: np.ndarray, y: np.ndarray, tested: np.ndarray, n: int, penalty: float) -> np.ndarray:
    sk = _scikit_learn()
    probability, seen = np.zeros((len(tested), n)), np.unique(y)
    if len(seen) == 1:
        probability[:, seen] = 1.0
        return probability
    regression = sk.linear_model.LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000, tol=1e-3)
    fitted = sk.pipeline.make_pipeline(sk.preprocessing.StandardScaler(), regression).fit(x, y)
    probability[:, seen] = fitted.predict_proba(tested)
    return probability


def _balanced_accuracy(found: np.ndarray, y: np.ndarray) -> float:
    """Mean over the labels in ``y`` of the part that was found; sklearn's warns of labels that ``y`` lacks."""
    return float(np.mean([(found[y == label] == label).mean() for label in np.unique(y)]))


def _scores(probability: np.ndarray, y: np.ndarray, outer: _Folds) -> dict[str, Any]:
    sk = _scikit_learn()
    found, areas = probability.argmax(axis=1), []
    for label in np.unique(y):
        own = [(y[test] == label, probability[test, label]) for _, test in outer]
        both = [sk.metrics.roc_auc_score(is_it, score) for is_it, score in own if 0 < is_it.sum() < len(is_it)]
        areas += [np.mean(both)] if both else []
    return {
        "balanced_accuracy": _balanced_accuracy(found, y),
        "macro_f1": float(sk.metrics.f1_score(y, found, average="macro", zero_division=0)),
        "macro_auc": float(np.mean(areas)) if areas else np.nan,
    }


def _scikit_learn() -> Any:
    """scikit-learn with its parts that are used here."""
    try:
        import sklearn
        from sklearn import (  # noqa: F401
            cluster,
            linear_model,
            metrics,
            model_selection,
            pipeline,
            preprocessing,
        )
    except ImportError as error:
        raise InputError(
            "scores of labels need scikit-learn, which is not installed; pip install 'hifusion[labels]'"
        ) from error
    return sklearn
