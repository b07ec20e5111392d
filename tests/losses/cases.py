"""One row for each objective and each of its forms: name, hyperparameters, closed form."""

from functools import partial

import numpy as np

from . import batch_forms as of_batch
from . import closed_forms as f
from .closed_forms import Case

CASES: dict[str, Case] = {}


def case(name, formula, *, label="", **hyperparameters):
    """Register a row; `label` tells forms of the same objective apart."""
    CASES[f"{name}-{label}" if label else name] = Case(name, hyperparameters, formula)


def builtin(space, normalization, limit, sign=1):
    return lambda x: f.clip_ratio(sign * f.log_ratio(x, space, normalization), limit)


case("dpo", f.dpo)
case("dpo", lambda x: f.cpo_sigmoid(x, 0.3), label="reference-free", beta=0.3, reference_free=True)
case("sigmoid", partial(f.dpo, b=0.7), beta=0.7)
case("cdpo", partial(f.cdpo, b=0.2, e=0.15), beta=0.2, label_smoothing=0.15)
case("robust", partial(f.robust, b=0.2, e=0.1), beta=0.2)
case("exo_pair", partial(f.exo, b=0.3, e=1e-3), beta=0.3)
case("exo_pair", partial(f.exo, b=0.3, e=0.2), label="smooth", beta=0.3, label_smoothing=0.2)
case("hinge", partial(f.hinge, b=0.1))
case("hinge", partial(f.hinge, b=0.02, free=True), label="reference-free", beta=0.02, reference_free=True)
case("slic", partial(f.slic, d=4.0, w=0.5), delta=4.0, weight=0.5)
case(
    "slic",
    f.weighted((1.0, partial(f.slic, d=1.0, w=0.0)), (0.3, f.sft_tokens)),
    label="tokens",
    weight=0.3,
    normalization="tokens",
)
case("rso", partial(f.dpo, b=0.05))
case("rso", partial(f.hinge, b=0.05, free=True), label="hinge", form="hinge")
case("rso", partial(f.hinge, b=0.3), label="hinge-norm", form="hinge_norm", gamma=0.3)
case("ipo", partial(f.ipo, b=0.1))
case("ipo", partial(f.ipo_sum, b=0.5), label="sum", beta=0.5, normalization="sum")
case("sft", f.sft_tokens)
case("sft", f.sft_mean, label="mean", normalization="mean")
case("sft", f.sft_sum, label="sum", normalization="sum")
case("rpo", f.weighted((1.0, partial(f.dpo, b=0.2)), (0.3 * 0.2, f.sft_sum)), beta=0.2, eta=0.3)
case(
    "rpo", f.weighted((1.0, partial(f.dpo, b=0.5)), (0.2, f.sft_mean)), label="mean", beta=0.5, eta=0.2, variant="mean"
)
case(
    "rpo",
    f.weighted((1.0, partial(f.dpo, b=0.01)), (0.005, f.sft_tokens)),
    label="trl",
    variant="trl",
)
case("sft_dpo", f.weighted((1.0, f.dpo), (0.4, f.sft_sum)), gamma=0.4)
case("cpo", f.weighted((1.0, partial(f.cpo_sigmoid, b=0.1)), (1.0, f.sft_mean)))
case(
    "cpo",
    f.weighted((1.0, partial(f.cpo_sigmoid, b=0.2, e=0.1)), (0.5, f.sft_sum)),
    label="smooth-sum",
    beta=0.2,
    alpha=0.5,
    label_smoothing=0.1,
    normalization="sum",
)
case("cpo", f.weighted((1.0, partial(f.cpo_hinge, b=0.1)), (1.0, f.sft_mean)), label="hinge", form="hinge")
case(
    "cpo",
    f.weighted((1.0, partial(f.cpo_ipo, b=0.1)), (1.0, f.sft_tokens)),
    label="ipo-tokens",
    form="ipo",
    normalization="tokens",
)
case("orpo", partial(f.orpo, b=0.4), beta=0.4)
case("sigmoid_norm", partial(f.sigmoid_norm, b=2.0), beta=2.0)
case("simpo", partial(f.simpo, b=2.0, g=1.0))
case("simpo", partial(f.simpo, b=2.5, g=0.3, e=0.1), label="smooth", beta=2.5, gamma=0.3, label_smoothing=0.1)
case("alphapo", partial(f.alphapo, b=2.5, g=0.1, a=0.25))
case("alphapo", partial(f.alphapo, b=1.0, g=0.0, a=-0.5), label="negative", beta=1.0, gamma=0.0, alpha=-0.5)
case("alpha_dpo", partial(of_batch.alpha_dpo, b=2.5, g=0.4, a=0.2), beta=2.5, alpha=0.2)
case(
    "alpha_dpo_code",
    partial(of_batch.alpha_dpo_code, b=2.5, g=0.1, a=0.08, e=0.1),
    beta=2.5,
    gamma_beta_ratio=0.1,
    alpha=0.08,
    label_smoothing=0.1,
)
case("flex_dpo", partial(f.flex, b_w=0.1, b_l=0.08))
case("dpo_shift", partial(f.flex, b_w=0.01, b_l=0.007))
case(
    "dpo_shift",
    partial(f.flex, b_w=0.2, b_l=0.1, e=0.1),
    label="smooth",
    beta=0.2,
    shift=0.5,
    label_smoothing=0.1,
)
case("dpo_shift_linear", partial(f.flex, b_w=0.2, b_l=0.18), beta=0.2, first=0.9, last=0.6, batches=3.0)
case("bdpo", partial(f.bdpo, b=0.1, lam=0.5))
case("bdpo", partial(f.bdpo, b=0.3, lam=0.1), label="small", beta=0.3, mixture=0.1)
case("bdpo", f.dpo, label="is-dpo", mixture=1.0)
case("bpo", partial(f.bpo, b=0.1, a=0.3))
case("bpo", partial(f.bpo, b=0.2, a=0.5, hinged=True), label="hinge", beta=0.2, alpha=0.5, form="hinge")
case("dpop", partial(f.dpop, b=0.1, lam=50.0))
case("dpop", partial(f.dpop, b=0.1, lam=5.0), label="mild", penalty=5.0)
case("sgdpo", partial(f.sgdpo, b=0.1))
case("sgdpo", partial(f.sgdpo, b=0.3, e=0.1), label="smooth", beta=0.3, label_smoothing=0.1)
for space, normalization in (("policy_ratio", "mean"), ("ratio_space", "sum")):
    ratio = builtin(space, normalization, 3.0)
    case(
        "balanced_dpo",
        lambda x, ratio=ratio: f.balanced(x, 0.1, ratio(x), 1.0),
        label=f"{space}-{normalization}",
        coefficients=space,
        normalization=normalization,
        limit=3.0,
    )
    case(
        "ada_dpo",
        lambda x, ratio=ratio: f.balanced(x, 0.1, 0.7 * ratio(x), 1.0, "margin"),
        label=f"{space}-{normalization}",
        ratio=space,
        normalization=normalization,
        limit=3.0,
        target=0.7,
    )
inverse = builtin("policy_ratio", "mean", 2.0, sign=-1)
case(
    "balanced_dpo",
    lambda x: f.balanced(x, 0.1, 1.0, inverse(x), "margin"),
    label="rejected-margin",
    scaled="rejected",
    placement="margin",
)
case(
    "balanced_dpo",
    lambda x: f.balanced(x, 0.1, x.inputs["chosen_coefficient"], x.inputs["rejected_coefficient"]),
    label="input",
    coefficients="input",
)
case("h_dpo", partial(f.h_dpo, b=0.1, a=0.9), alpha=0.9)
case("odpo", lambda x: f.shifted(x, 0.1, 0.5 * x.inputs["offset"]), alpha=0.5)
case("r_dpo", lambda x: f.shifted(x, 0.1, -0.1 * (x.n_w - x.n_l)))
case(
    "uncertainty_dpo",
    lambda x: f.shifted(x, 0.1, -2.0 * (x.inputs["chosen_uncertainty"] - x.inputs["rejected_uncertainty"])),
    scale=2.0,
)
case(
    "uncertainty_dpo",
    lambda x: f.scaled(x, 0.1, f.exp(-0.5 * x.inputs["uncertainty"])),
    label="multiplicative",
    penalty="multiplicative",
    scale=0.5,
)
case("kto", partial(of_batch.kto_mean, b=0.1, d=1.0, u=1.0))
case(
    "kto",
    partial(of_batch.kto_mean, b=0.1, d=1.0, u=1.0, ratios="mismatched"),
    label="mismatched",
    kl="mismatched",
)
case(
    "kto",
    lambda x: f.kto(x, 0.2, 1.5, 0.5, f.np.maximum(x.inputs["kl"], 0)),
    label="input",
    beta=0.2,
    desirable_weight=1.5,
    undesirable_weight=0.5,
    kl="input",
)
case("kto", partial(f.kto, b=0.1, d=1.0, u=1.0, z=0.0), label="zero", kl="zero")
case("bco_pair", partial(f.bco, b=0.1))
case("bco", partial(of_batch.bco_first, b=0.1))
case("nca_pair", partial(f.nca, b=0.1))
case("sppo", partial(f.sppo, b=0.02, w=1.0, lo=0.0), beta=0.02)
case(
    "sppo",
    lambda x: f.sppo(x, 0.05, x.inputs["chosen_probability"], x.inputs["rejected_probability"]),
    label="input",
    beta=0.05,
    probabilities="input",
)
case("sppo_hard", partial(f.sppo, b=0.1, w=1.0, lo=0.0, factor=2.0))
case("cal_dpo", partial(f.cal_dpo, b=0.001))
case("cal_dpo", partial(f.cal_dpo, b=0.1), label="near", beta=0.1)
case("apo_zero", partial(f.apo_zero, b=0.1))
case("apo_down", partial(f.apo_down, b=0.1))
case("aot", partial(of_batch.aot, b=0.1))
case("aot", partial(of_batch.aot, b=0.1, e=0.1), label="smooth", label_smoothing=0.1)
case("aot_unpaired", partial(of_batch.aot_unpaired, b=0.1, e=0.2), label_smoothing=0.2)
case("discopop", partial(f.discopop, b=0.1, tau=0.05))
case("discopop", partial(f.discopop, b=0.05, tau=1.0), label="tau-1", beta=0.05, tau=1.0)
case("beta_dpo", of_batch.beta_dpo)
case(
    "beta_dpo",
    partial(of_batch.beta_dpo, b=0.2, a=0.05, share=0.5, decay=0.5, seed=7),
    label="half",
    beta=0.2,
    alpha=0.05,
    filtered=0.5,
    decay=0.5,
    seed=7,
)
case("dr_dpo", partial(of_batch.dr_dpo, b=0.1, prime=1.0))
case("dr_dpo", partial(of_batch.dr_dpo, b=0.3, prime=5.0), label="mild", beta=0.3, beta_prime=5.0)
case("chi_po", partial(f.chi_po, b=0.05))
case(
    "chi_po",
    partial(f.chi_po, b=0.1, bound=np.inf, a=0.5, g=0.3, limit=10.0),
    label="link",
    beta=0.1,
    reward_bound=float("inf"),
    alpha=0.5,
    gamma=0.3,
    limit=10.0,
)
for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
    case("f_divergence", f.divergence(f.dpo, kind), label=kind, divergence=kind)
case("f_divergence", f.divergence(f.dpo, "reverse_kl"), label="alpha-1", divergence="alpha_divergence", coefficient=1.0)
case(
    "f_divergence",
    f.divergence(partial(f.ipo, b=0.2), "js_divergence"),
    label="ipo",
    base="ipo",
    beta=0.2,
    divergence="js_divergence",
)
case("mpo", f.weighted((0.8, f.dpo), (0.2, partial(f.bco, b=0.1)), (1.0, f.sft_tokens)))
case(
    "mpo",
    f.weighted((0.5, partial(f.hinge, b=0.1)), (2.0, partial(f.apo_zero, b=0.1))),
    label="own",
    objectives=["hinge", "apo_zero"],
    weights=[0.5, 2.0],
)
case("spo", f.weighted((1.0, f.dpo), (1.0, f.sft_mean)))
case(
    "spo",
    f.weighted((1.0, partial(f.simpo, b=2.0, g=1.0)), (0.3, f.sft_sum)),
    label="simpo",
    base="simpo",
    weight=0.3,
    normalization="sum",
)
case(
    "spo",
    f.spo_hinge(partial(f.dpop, b=0.1, lam=50.0), 2.0, 0.1),
    label="dpop-hinge",
    base="dpop",
    weight=2.0,
    penalty="hinge",
    epsilon=0.1,
)
case(
    "spo",
    partial(f.spo_hinge_input, base=f.dpo, weight=0.5, epsilon=0.1),
    label="hinge-input",
    penalty="hinge",
    value="input",
    weight=0.5,
    epsilon=0.1,
    normalization="sum",
)
case("spo", f.weighted((1.0, partial(of_batch.aot, b=0.1)), (1.0, f.sft_mean)), label="aot", base="aot")
case("wpo", f.wpo)
case("wpo", partial(f.wpo, clamp=False), label="trl", clamp=False)
case("spo", f.weighted((1.0, f.wpo), (1.0, f.sft_mean)), label="wpo", base="wpo")
case("tdpo", partial(f.tdpo, b=0.1, a=0.5))
case("tdpo", partial(f.tdpo, b=0.2, a=1.0), label="1", beta=0.2, variant="tdpo1")
