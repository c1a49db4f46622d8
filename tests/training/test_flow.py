"""The flow page against closed forms: the loss in fp64, the densities of the noise levels, the ends of sigma."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd3pipe.errors import ParameterError
from sd3pipe.rules.flow import LossRules, SigmaSampling
from sd3pipe.training import flow

SCHEMES = ("uniform", "none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
PAIRS = [
    (scheme, form) for form in ("velocity", "x0") for scheme in SCHEMES if (scheme, form) != ("sigma_sqrt", "velocity")
]
SIGMAS = torch.tensor([0.004, 0.13, 0.5, 0.77, 1.0])
# fp32 rounding of a mean over 16 * 6 * 4 values of size 1; the closed forms below differ in algebra, not in size
RTOL = 2e-6


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    velocity, latents, noise = torch.randn(3, len(SIGMAS), 16, 6, 4, generator=generator)
    return velocity, latents, noise


def penalty_fp64(errors, loss_type, c):
    """The penalties as sd-scripts writes them, in fp64."""
    if loss_type == "l2":
        return errors**2
    if loss_type == "l1":
        return np.abs(errors)
    root = np.sqrt(errors**2 + c**2) - c
    return 2 * c * root if loss_type == "huber" else 2 * root


def thresholds_fp64(sigmas, schedule, huber_c, scale):
    noise_to_signal = sigmas / np.maximum(1 - sigmas, 1e-100)
    return (
        scale
        * {
            "constant": np.full_like(sigmas, huber_c),
            "exponential": np.exp(1000 * sigmas * math.log(huber_c) / 1000),
            "snr": (1 - huber_c) / (1 + noise_to_signal) ** 2 + huber_c,
        }[schedule]
    )


def loss_fp64(velocity, latents, noise, sigmas, *, scheme, form, loss_type, c):
    """Each sample's loss, written from the definitions: predicted against wanted, elementwise weight, mean."""
    v, z, n = (tensor.double().numpy() for tensor in (velocity, latents, noise))
    s = sigmas.double().numpy()[:, None, None, None]
    noisy = (1 - s) * z + s * n
    predicted, wanted = (noisy - s * v, z) if form == "x0" else (v, n - z)
    weight = np.ones_like(s)
    if form == "x0" and scheme == "sigma_sqrt":
        weight = s**-2
    if form == "x0" and scheme == "cosmap":
        weight = 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    return (weight * penalty_fp64(predicted - wanted, loss_type, c[:, None, None, None])).mean(axis=(1, 2, 3))


@pytest.mark.parametrize(("scheme", "form"), PAIRS)
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_loss_equals_its_definition_in_fp64(batch, scheme, form, loss_type):
    huber = {"huber_schedule": "exponential", "huber_c": 0.07, "huber_scale": 1.3}
    rules = LossRules(weighting_scheme=scheme, loss_form=form, loss_type=loss_type, **huber)
    actual = flow.losses(*batch, SIGMAS, rules)
    c = thresholds_fp64(SIGMAS.double().numpy(), "exponential", 0.07, 1.3)
    expected = loss_fp64(*batch, SIGMAS, scheme=scheme, form=form, loss_type=loss_type, c=c)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=RTOL)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_every_huber_schedule_works(batch, schedule, loss_type):
    huber = {"huber_schedule": schedule, "huber_c": 0.2, "huber_scale": 0.6}
    actual = flow.losses(*batch, SIGMAS, LossRules(weighting_scheme="none", loss_type=loss_type, **huber))
    c = thresholds_fp64(SIGMAS.double().numpy(), schedule, 0.2, 0.6)
    expected = loss_fp64(*batch, SIGMAS, scheme="none", form="velocity", loss_type=loss_type, c=c)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=RTOL)


def test_huber_keeps_tiny_errors(batch):
    _, latents, noise = batch
    nearly = noise - latents + 1e-6
    wanted = (nearly.double() - (noise - latents).double()).square().mean(dim=(1, 2, 3))
    rules = LossRules(weighting_scheme="none", loss_type="huber", huber_schedule="constant", huber_c=0.5)
    actual = flow.losses(nearly, latents, noise, SIGMAS, rules)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("scheme", "form"), PAIRS)
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_loss_and_gradient_are_finite_at_the_ends(batch, scheme, form, loss_type):
    velocity, latents, noise = (tensor[:2] for tensor in batch)
    velocity = velocity.clone().requires_grad_()
    ends = torch.tensor([0.0, 1.0])
    values = flow.loss(velocity, latents, noise, ends, weighting_scheme=scheme, loss_form=form, loss_type=loss_type)
    values.sum().backward()
    assert velocity.grad is not None
    assert torch.isfinite(values).all()
    assert torch.isfinite(velocity.grad).all()


def test_sigma_sqrt_is_the_plain_velocity_loss_even_at_sigma_0(batch):
    sigmas = torch.tensor([0.0, 0.0004, 0.001, 0.4, 1.0])
    x0 = flow.loss(*batch, sigmas, weighting_scheme="sigma_sqrt", loss_form="x0")
    velocity = flow.loss(*batch, sigmas, weighting_scheme="none", loss_form="velocity")
    torch.testing.assert_close(x0, velocity, rtol=RTOL, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SigmaSampling(weighting_scheme="sigma_sqrt", loss_form="velocity"),
        lambda: flow.loss(
            *torch.zeros(3, 1, 4, 2, 2), torch.zeros(1), weighting_scheme="sigma_sqrt", loss_form="velocity"
        ),
    ],
)
def test_sigma_sqrt_is_refused_under_velocity_with_the_reason(make):
    with pytest.raises(ParameterError, match=r"undoes the sigma\^2 weight of the x0 form"):
        make()


@pytest.mark.parametrize(
    "wrong", [{"weighting_scheme": "cosmop"}, {"loss_form": "epsilon"}, {"loss_type": "l3"}], ids=str
)
def test_names_that_are_none_are_refused(batch, wrong):
    names = {"weighting_scheme": "cosmap", "loss_form": "velocity", "loss_type": "l2"} | wrong
    with pytest.raises(ParameterError, match=next(iter(wrong.values()))):
        flow.loss(*batch, SIGMAS, **names)


def test_noising_and_target_are_fp32_and_consistent(batch):
    _, latents, noise = batch
    noisy = flow.add_noise(latents.half(), noise.half(), SIGMAS)
    assert noisy.dtype == torch.float32
    velocity = flow.velocity_target(latents.half(), noise.half())
    step_back = noisy - SIGMAS.view(-1, 1, 1, 1) * velocity  # Euler from sigma to 0 along the exact velocity
    torch.testing.assert_close(step_back, latents.half().float(), rtol=0, atol=2e-6)
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(5)), latents)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(5)), noise)


def test_another_target_replaces_the_flows(batch):
    velocity, latents, noise = batch
    rules = LossRules(weighting_scheme="none", loss_form="x0")
    assert flow.losses(velocity, latents, noise, SIGMAS, rules, target_BChw=velocity).max() == 0
    same = flow.losses(velocity, latents, noise, SIGMAS, rules, target_BChw=noise - latents)
    assert torch.equal(same, flow.losses(velocity, latents, noise, SIGMAS, rules))


def test_masked_loss_is_the_mean_over_the_masked_area(batch):
    velocity, latents, noise = batch
    mask = torch.zeros(5, 6, 4)
    mask[:, :3] = 1
    rules = LossRules(weighting_scheme="none")
    halves = flow.losses(*(tensor[:, :, :3] for tensor in batch), SIGMAS, rules)
    area = flow.losses(velocity, latents, noise, SIGMAS, rules, mask_Bhw=mask)
    picture = flow.losses(velocity, latents, noise, SIGMAS, replace(rules, masked_loss="sum"), mask_Bhw=mask)
    torch.testing.assert_close(area, halves, rtol=RTOL, atol=0)
    torch.testing.assert_close(picture, halves / 2, rtol=RTOL, atol=0)
    assert flow.losses(velocity, latents, noise, SIGMAS, rules, mask_Bhw=torch.zeros(5, 6, 4)).tolist() == [0.0] * 5


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def mode_cdf(sigma, scale):
    """P(f(u) <= sigma) for the falling map of eq. 20, by bisection on u."""
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        value = 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        low, high = (u, high) if value > sigma else (low, u)
    return 1 - low


def unshifted(sigma, shift):
    return sigma / (shift - (shift - 1) * sigma)


def scheme_cdf(sigma, scheme, form):
    """Closed-form distribution function of the scheme's times (integrals of the paper's densities)."""
    if sigma <= 0 or sigma >= 1:
        return float(sigma >= 1)
    if scheme == "logit_normal":
        return normal_cdf((math.log(sigma / (1 - sigma)) - 0.3) / 0.8)
    if scheme == "mode":
        return mode_cdf(sigma, 0.9)
    if scheme == "cosmap" and form == "velocity":  # integral of 2 / (pi - 2 pi t + 2 pi t^2)
        return 0.5 + 2 / math.pi * math.atan(2 * sigma - 1)
    return sigma


@pytest.mark.parametrize(("scheme", "form"), PAIRS)
def test_histogram_of_sigmas_follows_the_closed_form(scheme, form):
    sampling = SigmaSampling(
        weighting_scheme=scheme, loss_form=form, logit_mean=0.3, logit_std=0.8, mode_scale=0.9,
        training_shift=2.0, min_timestep=100, max_timestep=900,
    )  # fmt: skip
    draws = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    sigmas = flow.sample_sigmas(draws, torch.ones(len(draws)), sampling)
    edges = np.linspace(0.1, 0.9, 17)
    bins = edges - 1e-6  # so that the whole timesteps of the x0 form fall into the bins of their draws
    bins[-1] = 0.9 + 1e-6  # fp32 rounds the largest draws up to the limit itself
    counts, _ = np.histogram(sigmas.numpy(), bins=bins)
    cdf = [scheme_cdf(unshifted((edge - 0.1) / 0.8, 2.0), scheme, form) for edge in edges]
    expected = np.diff(cdf) * len(draws)
    deviations = (counts - expected) / np.sqrt(np.maximum(expected, 1))
    assert counts.sum() == len(draws)
    assert np.abs(deviations).max() < 4.5  # 16 bins at a fixed seed: 4.5 standard deviations


def test_x0_form_draws_whole_timesteps_and_velocity_continuous_ones():
    draws = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    drawn = {
        form: flow.sample_sigmas(
            draws, torch.ones(1000), SigmaSampling(weighting_scheme="none", loss_form=form, training_shift=1.0)
        )
        for form in ("x0", "velocity")
    }
    assert torch.equal(drawn["x0"], (draws.double() * 1000).floor().div(1000).float())
    torch.testing.assert_close(drawn["velocity"], draws, rtol=1e-6, atol=0)


def test_auto_shift_grows_with_the_side_and_never_falls_under_one():
    pixels = torch.tensor([64 * 64, 512 * 512, 1024 * 1024, 1024 * 4096])
    expected = torch.tensor([1.0, 1.5, 3.0, 6.0], dtype=torch.float64)
    assert torch.equal(flow.training_shifts(pixels, "auto"), expected)
    sampling = SigmaSampling(weighting_scheme="uniform", training_shift="auto")
    sigmas = flow.sample_sigmas(torch.full((4,), 0.5), pixels, sampling)
    torch.testing.assert_close(sigmas, torch.tensor([1 / 2, 1.5 / 2.5, 3 / 4, 6 / 7]))


def test_default_sampling_at_1024_pixels_has_mean_sigma_071():
    draws = (torch.arange(10_000) + 0.5) / 10_000
    sigmas = flow.sample_sigmas(draws, torch.full((10_000,), 1024**2), SigmaSampling())
    assert sigmas.mean().item() == pytest.approx(0.71, abs=0.005)


@pytest.mark.parametrize(("scheme", "form"), PAIRS)
def test_extreme_draws_stay_in_range(scheme, form):
    sampling = SigmaSampling(weighting_scheme=scheme, loss_form=form, mode_scale=1.75, training_shift=3.0)
    sigmas = flow.sample_sigmas(torch.tensor([0.0, 1 - 2**-24]), torch.ones(2), sampling)
    assert torch.isfinite(sigmas).all()
    assert ((sigmas >= 0) & (sigmas <= 1)).all()


@pytest.mark.parametrize(("low", "high"), [(-1, 500), (500, 500), (0, 1001)])
def test_impossible_timestep_ranges_are_refused(low, high):
    with pytest.raises(ParameterError, match="min_timestep"):
        SigmaSampling(min_timestep=low, max_timestep=high)
