"""The methods paragraph of a report, ready for a paper: what was done, with versions, and what is to be cited."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hifusion.errors import plain
from hifusion.expression import NORMALISATIONS

# What a paper that uses a network, or a part of this package, cites.
REFERENCES: dict[str, str] = {
    "hifusion": "Weng et al. HiFusion: hierarchical intra-spot alignment and regional context fusion for spatial gene "
    "expression prediction from histopathology. AAAI 2026; arXiv 2511.12969.",
    "stnet": "He et al. Integrating spatial gene expression and breast tumour morphology via deep learning. Nature "
    "Biomedical Engineering 4, 827-834 (2020).",
    "histogene": "Pang et al. Leveraging information in spatial transcriptomics to predict super-resolution gene "
    "expression from histology images in tumors. bioRxiv 2021.11.28.470212.",
    "hist2st": "Zeng et al. Spatial transcriptomics prediction from histology jointly through Transformer and graph "
    "neural networks. Briefings in Bioinformatics 23, bbac297 (2022).",
    "egn": "Yang et al. Exemplar guided deep neural network for spatial transcriptomics analysis of gene expression "
    "prediction. WACV 2023.",
    "triplex": "Chung et al. Accurate spatial gene expression prediction by integrating multi-resolution features. "
    "CVPR 2024.",
    "asign": "Zhu et al. ASIGN: an anatomy-aware spatial imputation graphic network for 3D spatial transcriptomics. "
    "CVPR 2025.",
    "bleep": "Xie et al. Spatially resolved gene expression prediction from H&E histology images via bi-modal "
    "contrastive learning. NeurIPS 2023.",
    "anndata": "Virshup et al. anndata: access and store annotated data matrices. Journal of Open Source Software 9, "
    "4371 (2024).",
    "torch": "Paszke et al. PyTorch: an imperative style, high-performance deep learning library. NeurIPS 2019.",
}
_PANELS = {
    "top_mean": "the {size} genes with the highest mean count in the training sections",
    "highly_variable": "the {size} most variable genes of the training sections",
    "moran": "the {size} genes with the strongest spatial pattern (Moran's I) in the training sections",
    "paper": "the {size} genes with the highest mean count over all sections, tested ones included",
    "her2st_paper": "the {size} genes with the highest mean count over all sections of her2st, tested ones included",
}


def evaluation_methods(result: Mapping[str, Any]) -> list[str]:
    """How an evaluation was done."""
    its = next(iter(result["models"].values()))
    recipes, protocol = result.get("recipes", {}), result["protocol"]
    seeds = max([1, *(len(model.get("by_seed", {})) for model in result["models"].values())])
    over = its["interval_over"]
    return [
        data_words(result["recipe"], [fold["n_genes"] for fold in result["folds"]]),
        *(
            network_words(name, recipe, f", {seeds} seed{'s' * (seeds > 1)} each")
            for name, recipe in recipes.items()
            if name in result["models"]
        ),
        f"Sections were split by the protocol {plain(protocol['name'])}: {plain(protocol['meaning'], 200)} "
        f"({its['n_folds']:.0f} fold{'s' * (its['n_folds'] != 1)}, {its['n_sections']:.0f} tested sections of "
        f"{its['n_patients']:.0f} patient{'s' * (its['n_patients'] != 1)}, {its['n_spots']:,.0f} spots)"
        + (
            ", after a check that no image, no counts and, between patients, no patient stand on both sides."
            if result.get("leak_check")
            else "; the check for leaks between training and test was switched off."
        ),
        "For each gene of each tested section Pearson's correlation between predicted and measured expression was "
        "taken over spots (0 where it is undefined), averaged over the sections of a patient, over patients, and then "
        "over genes; the squared error was split into the offset of the section's mean and the pattern within it. "
        + (f"Intervals are 95 % bootstrap intervals over {over}. " if over else "")
        + "The ceiling is the correlation that counting noise leaves possible: molecules were dealt into two halves by "
        "binomial thinning, and the halves' correlation was corrected by Spearman and Brown's formula. Beside every "
        "network stand the mean of the training spots, and ridge regressions where images allow them.",
        versions_words(result["versions"]),
    ]


def run_methods(facts: Mapping[str, Any], genes: int) -> list[str]:
    """How a run was trained."""
    recipe = facts["recipe"]
    return [
        data_words(recipe, [genes]),
        *_weights_words(facts),
        versions_words(facts["versions"]),
    ]


def _weights_words(facts: Mapping[str, Any]) -> list[str]:
    """How a run came to its weights."""
    recipe, published = facts["recipe"], facts.get("weights")
    given = f"published weights, of a file whose SHA-256 begins with {published}"
    learned = network_words(recipe["network"], recipe, f", seed {facts['seed']}")
    if not published:
        return [learned]
    if not recipe["epochs"]:
        return [f"{plain(recipe['network'])} has {given}; it was not trained further."]
    kept = " No epoch was better than these, which were kept." if facts["best_epoch"] is None else ""
    return [f"Training began with {given}.{kept}", learned]


def data_words(recipe: Mapping[str, Any], genes: Sequence[int]) -> str:
    """Unit and panel, of as many genes as each fold has."""
    unit, rule = recipe["normalisation"], str(recipe["panel"])
    meaning = NORMALISATIONS[unit].meaning if unit in NORMALISATIONS else "a unit this version does not know"
    sizes = " or ".join(map(str, sorted(set(genes))))
    panel = _PANELS.get(rule, "{size} genes of a given list").format(size=sizes)
    anew = " of each fold" if len(genes) > 1 and panel.endswith("training sections") else ""
    return (
        f"Spatial gene expression was predicted with the package hifusion. Expression is {plain(unit)} ({meaning}); "
        f"the panel is {panel}{anew}."
    )


def network_words(name: str, recipe: Mapping[str, Any], how_often: str) -> str:
    """How one network was trained."""
    scale = recipe.get("region_mpp")
    patches = f"H&E patches of {scale:g} µm a pixel" if scale else "H&E patches of the slide's own scale"
    if recipe["network"] == "hifusion_frozen":  # fitted at once: epochs and rate decide nothing of it
        return (
            f"{plain(name)} was fitted by the recipe {plain(recipe['name'])}: HiFusion's levels and attention over "
            f"features of a frozen encoder ({plain(recipe['encoder'])}) of {patches}, blended with kernel regression "
            f"on the same features and on the spot's place, by what training spots that were left out tell{how_often}."
        )
    chosen = {
        "validation": "the epoch with the lowest squared error on spots held out of the test and the training was kept",
        "last": "the last epoch was kept",
    }
    return (
        f"{plain(name)} was trained by the recipe {plain(recipe['name'])}: at most {recipe['epochs']} epochs of "
        f"{plain(recipe['optimiser'])} at a learning rate of {recipe['lr']:g}, {recipe['batch_size']} spots a batch"
        f", on {patches}{how_often}; {chosen.get(recipe['selection'], plain(recipe['selection']))}."
    )


def versions_words(versions: Mapping[str, str]) -> str:
    return f"Versions: {', '.join(f'{plain(name)} {plain(number)}' for name, number in versions.items())}."


def references(models: Iterable[str]) -> list[str]:
    """What to cite for these models, the method of this package first."""
    asked = list(models)
    return [
        text
        for key, text in REFERENCES.items()
        if key in ("hifusion", "anndata", "torch") or any(name.startswith(key) for name in asked)
    ]
