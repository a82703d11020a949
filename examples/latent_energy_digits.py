r"""Bayes over the energy of a latent space, and what log Z may cost.

A decoder g turns points of a plane into digits, x = g(z) + noise. It was trained as if z ~ N(0, I),
but digits do not fill the plane that way. An energy on top of the base says how they do,

    p(z | theta) = N(z; 0, I) exp(theta . f(z)) / Z(theta),

with f(z) sixteen bumps on a square and theta ~ Normal(0, 2). This is an exponential family: log Z
is convex, and draws of the base are all that is needed to know it,

    log Z(theta) = log mean_s exp(theta . f(z_s)),    z_1, ..., z_S ~ N(0, I).

With the draws held, HMC goes through it: over the weights and the latents of all digits at once.

1. *What log Z costs.* Its error displaces the posterior of p weights by about (p n / S)^.5 of a
   standard deviation, S being the effective number of draws and n that of digits. A bootstrap of
   the draws says what it is for each weight: `mcse_logz`.
2. *Is it right?* In a plane quadrature gives log Z, and the latents can be summed out.
3. *Is it better?* New digits of the posterior and of N(0, I) beside digits that nothing has seen.

Why no network in place of theta . f(z)? Because of that rule. For 16 weights and 150 digits tens of
thousands of draws do; 10 000 weights would take tens of millions for the same care, and draws near
the posterior, which those of N(0, I) are then not. What is Bayesian here is therefore the last
layer, linear in at most some fifty weights. Whole networks are learned: see `nce_two_moons.py`.

Run it; the figure and the draws, for ArviZ, go to results/latent_energy_digits::

    python examples/latent_energy_digits.py            # a minute and a half
    python examples/latent_energy_digits.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_ebm as ebm
from pyro_ebm.chains import mmd2_bootstrap, mmd2_difference
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import Anchored, mcse_logz

NUM_TRAIN, NUM_OBSERVED = 1000, 150
CENTERS = torch.cartesian_prod(*[torch.linspace(-1.8, 1.8, 4, dtype=torch.float64)] * 2)
WIDTH = 0.8
PRIOR_SD = 2.0
MESH = 0.08  # of the quadrature; the latent of a digit is known to .04 and worse


def bumps(z: Tensor) -> Tensor:
    """Returns the fixed features, ``(..., 16)``."""
    return torch.exp(-0.5 * (z[..., None, :] - CENTERS).square().sum(-1) / WIDTH**2)


def base() -> dist.Distribution:
    """The law that the decoder was trained for."""
    return dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


# --- a decoder


@dataclass(frozen=True)
class Decoder:
    """What turns points of the plane into digits, and back roughly."""

    encoder: nn.Module
    network: nn.Module
    noise: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Returns the mean image, ``(..., 64)``."""
        return self.network(z)

    def codes(self, x: Tensor) -> Tensor:
        """Returns where the images come from, roughly, ``(..., 2)``."""
        return self.encoder(x)[..., :2]


def train(x: Tensor, num_steps: int) -> Decoder:
    """Returns a decoder by the evidence lower bound of a variational autoencoder."""
    encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).double()
    layers = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 64), nn.Sigmoid()
    network = nn.Sequential(*layers).double()
    log_noise = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    parameters = [*encoder.parameters(), *network.parameters(), log_noise]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(num_steps):
        mean, log_sd = encoder(x).chunk(2, -1)
        guide = dist.Normal(mean, log_sd.exp())
        likelihood = dist.Normal(network(guide.rsample()), log_noise.exp()).log_prob(x).sum(-1)
        divergence = torch.distributions.kl_divergence(guide, dist.Normal(0.0, 1.0)).sum(-1)
        loss = (divergence - likelihood).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad = False
    return Decoder(encoder, network, log_noise.exp())


# --- the posterior of weights and latents


def prior_of_weights() -> dist.Distribution:
    """Normal weights, wide enough for an odds ratio of 50 between bumps."""
    return dist.Normal(torch.zeros(len(CENTERS), dtype=torch.float64), PRIOR_SD).to_event(1)


def model(decoder: Decoder, log_z: Anchored, x: Tensor) -> None:
    """Digits from latents from an energy."""
    theta = pyro.sample("theta", prior_of_weights())
    law = ebm.EnergyDistribution(
        lambda z: -(bumps(z) * theta).sum(-1), base(), log_normalizer=lambda: log_z(theta)
    )
    with pyro.plate("digits", len(x)):
        z = pyro.sample("z", law)
        pyro.sample("x", dist.Normal(decoder(z), decoder.noise).to_event(1), obs=x)


def likely_latents(decoder: Decoder, x: Tensor, num_chains: int) -> Tensor:
    """Returns draws of every digit's latent under the base, ``(num_chains, n, 2)``.

    Some digits could come from two places, between which no chain will find its way: to start all
    of them at the encoder's guess would miss the other one, and R-hat would not tell.
    """
    z = base().sample((4000,))
    log_likelihood = -0.5 * torch.cdist(x, decoder(z)).square() / decoder.noise.square()
    return z[dist.Categorical(logits=log_likelihood).sample((num_chains,))]


def sample_posterior(decoder: Decoder, log_z: Anchored, x: Tensor, num_samples: int) -> MCMC:
    """Runs 8 chains over weights and latents."""
    kernel = HMC(model, metric="diagonal")
    mcmc = MCMC(kernel, num_samples, num_samples, num_chains=8, disable_progbar=True)
    start = {
        "theta": 0.3 * torch.randn(8, len(CENTERS), dtype=torch.float64),
        "z": likely_latents(decoder, x, 8),
    }
    mcmc.run(decoder, log_z, x, initial_params=start)
    return mcmc


def from_base(num_draws: int) -> Anchored:
    """Returns log Z from draws of the base: its anchor is theta = 0, where log Z is 0."""
    z = base().sample((100, num_draws // 100))
    return Anchored(torch.zeros(1, len(CENTERS)), bumps(z)[None], log_normalizer=0.0)


# --- the truth, in a plane


@dataclass(frozen=True)
class Quadrature:
    """A mesh on the plane, with the likelihood of every digit at every point up to a factor."""

    mesh: Tensor
    log_base: Tensor
    likelihood: Tensor

    @classmethod
    def of(cls, decoder: Decoder, x: Tensor) -> Quadrature:
        """Evaluates the decoder on the mesh."""
        axis = torch.arange(-4.0, 4.0 + MESH, MESH, dtype=torch.float64)
        mesh = torch.cartesian_prod(axis, axis)
        log_likelihood = -0.5 * torch.cdist(x, decoder(mesh)).square() / decoder.noise.square()
        likelihood = (log_likelihood - log_likelihood.amax(1, keepdim=True)).exp()
        return cls(mesh, base().log_prob(mesh).log_softmax(0), likelihood)

    def scores(self, theta: Tensor) -> Tensor:
        """Returns log base + theta . f on the mesh, ``(..., points)``."""
        return self.log_base + theta @ bumps(self.mesh).mT

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """Returns log Z in nats, ``(...)``."""
        return self.scores(theta).logsumexp(-1)

    def model(self) -> None:
        """The model with its latents summed out."""
        theta = pyro.sample("theta", prior_of_weights())
        density = self.scores(theta).softmax(-1)
        pyro.factor("digits", (self.likelihood @ density).log().sum())

    def latent_moments(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of every latent under draws ``(S, p)`` of theta."""
        weights = torch.zeros_like(self.likelihood)
        for density in self.scores(theta).softmax(-1):
            joint = self.likelihood * density
            weights += joint / joint.sum(1, keepdim=True) / len(theta)
        mean = weights @ self.mesh
        return mean, (weights @ self.mesh.square() - mean.square()).sqrt()


def sample_exactly(quadrature: Quadrature, num_samples: int) -> MCMC:
    """Runs 4 chains over the weights alone."""
    mcmc = MCMC(HMC(quadrature.model), num_samples, num_samples, num_chains=4, disable_progbar=True)
    mcmc.run(initial_params={"theta": 0.3 * torch.randn(4, len(CENTERS), dtype=torch.float64)})
    return mcmc


# --- what is printed


def print_cost(log_z: Anchored, quadrature: Quadrature, theta: Tensor, num_draws: int) -> None:
    """Prints the effective number of draws and the rule, and log Z against quadrature."""
    size = float(log_z.effective_size(theta).median())
    rule = float(log_z.displacement(theta, NUM_OBSERVED).median())
    error = log_z(theta) - quadrature.log_normalizer(theta)
    print(f"draws of the base {num_draws}, effective at the posterior {size:.0f}")
    print(f"(p n / S)^.5 = {rule:.2f} posterior standard deviations, all weights together")
    print(f"log Z - quadrature, nats: mean {error.mean():+.4f}, sd over draws {error.std():.4f}")


def error_of_log_z(joint: MCMC, log_z: Anchored, num_replicates: int) -> Tensor:
    """Returns how far posterior means move from one set of base draws to another, ``(p,)``."""
    found = mcse_logz(
        {"theta": joint.get_samples()["theta"]},
        log_z,
        lambda draws: draws["theta"],
        NUM_OBSERVED,
        num_replicates=num_replicates,
        max_draws=200,
    )
    return torch.as_tensor(found.mcse["theta"]["mean"])


def print_weights(joint: MCMC, exact: MCMC, error: Tensor) -> None:
    """Prints the posterior of every weight both ways."""
    print(f"\n{'bump at':<13} {'HMC':>7} {'sd':>6} {'R-hat':>6} {'ESS':>5} ", end="")
    print(f"{'mcse':>6} {'mcse_logz':>9} | {'summed':>7} {'sd':>6} {'mcse':>6}")
    rows = joint.summary().filter(like="theta", axis=0), exact.summary()
    for center, own, other, extra in zip(
        CENTERS, rows[0].itertuples(), rows[1].itertuples(), error, strict=True
    ):
        print(f"({center[0]:>4.1f}, {center[1]:>4.1f})  {own.mean:>7.3f} {own.sd:>6.3f} ", end="")
        print(
            f"{own.r_hat:>6.3f} {own.ess_bulk:>5.0f} {own.mcse_mean:>6.3f} {extra:>9.3f} | ", end=""
        )
        print(f"{other.mean:>7.3f} {other.sd:>6.3f} {other.mcse_mean:>6.3f}")


def print_latents(joint: MCMC, exact: MCMC, quadrature: Quadrature) -> None:
    """Prints how far the means of the latents are from those by quadrature."""
    theta = exact.get_samples(group_by_chain=False)["theta"]
    mean, sd = quadrature.latent_moments(theta[:: max(1, len(theta) // 50)])
    z = joint.get_samples(group_by_chain=False)["z"]
    off = (z.mean(0) - mean).abs() / sd
    print(f"\n{off.numel()} coordinates of latents, means off in standard deviations: ", end="")
    print(
        f"median {off.median():.2f}, 95 % below {off.quantile(0.95):.2f}, largest {off.max():.2f}"
    )


def new_latents(theta: Tensor, num_candidates: int = 300) -> Tensor:
    """Returns a draw of the latent law of each theta: one of many base draws, by weight."""
    z = base().sample((len(theta), num_candidates))
    chosen = torch.multinomial((bumps(z) @ theta[:, :, None])[..., 0].softmax(-1), 1)
    return z[torch.arange(len(theta)), chosen[:, 0]]


def print_new_digits(decoder: Decoder, theta: Tensor, unseen: Tensor) -> dict[str, Tensor]:
    """Prints how far new digits are from unseen ones, and returns their means."""
    latents = {"N(0, I)": base().sample((len(theta),)), "posterior": new_latents(theta)}
    means = {name: decoder(z) for name, z in latents.items()}
    digits = {name: m + decoder.noise * torch.randn_like(m) for name, m in means.items()}
    print(f"\n1000 MMD^2 of {len(theta)} new digits to {len(unseen)} unseen, 95 % intervals")
    for name, x in digits.items():
        found = mmd2_bootstrap(x, unseen, num_bootstrap=200)
        print(f"{name:<12} {_thousands(found)}")
    gain = mmd2_difference(digits["posterior"], digits["N(0, I)"], unseen, num_bootstrap=200)
    print(f"{'gain':<12} {_thousands(gain)}")
    return means


def _thousands(found: ebm.chains.MMDInterval) -> str:
    value, lower, upper = (1000.0 * v for v in (found.value, found.lower, found.upper))
    return f"{value:>6.2f} [{lower:.2f}, {upper:.2f}]"


# --- the figure


def draw_plane(ax: Axes, quadrature: Quadrature, theta: Tensor, codes: Tensor) -> None:
    """Draws the posterior mean density of the latents, with the codes of unseen digits."""
    density = quadrature.scores(theta[:: max(1, len(theta) // 200)]).softmax(-1).mean(0)
    side = round(len(density) ** 0.5)
    axis = quadrature.mesh[:side, 1]
    ax.contourf(axis, axis, density.reshape(side, side).mT, 12, cmap="Blues")
    ax.plot(*codes.mT, "k.", markersize=2, label="unseen digits, encoded")
    ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), title="posterior mean of p(z)")
    ax.legend(loc="upper right")


def draw_digits(ax: Axes, title: str, x: Tensor) -> None:
    """Draws the first 80 images."""
    framed = nn.functional.pad(x[:80].reshape(8, 10, 8, 8), (1, 1, 1, 1))
    rows = framed.transpose(1, 2).reshape(80, 100)
    ax.imshow(rows, cmap="gray_r", vmin=0.0, vmax=1.0)
    ax.set(title=title, xticks=[], yticks=[])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/latent_energy_digits"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Trains a decoder, infers weights and latents, checks, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    num_samples, num_draws = (10, 5_000) if args.smoke else (120, 50_000)
    x = torch.tensor(load_digits().data) / 16.0
    x = x[torch.randperm(len(x))]
    trained, observed, unseen = x.split(
        [NUM_TRAIN, NUM_OBSERVED, len(x) - NUM_TRAIN - NUM_OBSERVED]
    )
    decoder = train(trained, 100 if args.smoke else 1000)

    log_z, quadrature = from_base(num_draws), Quadrature.of(decoder, observed)
    joint = sample_posterior(decoder, log_z, observed, num_samples)
    exact = sample_exactly(quadrature, num_samples)
    theta = joint.get_samples(group_by_chain=False)["theta"]
    some = theta[:: max(1, len(theta) // 200)]
    print_cost(log_z, quadrature, some, num_draws)
    if not args.smoke:
        log_z.check(some, NUM_OBSERVED)  # raises where the rule is broken
    print_weights(joint, exact, error_of_log_z(joint, log_z, 10 if args.smoke else 20))
    print_latents(joint, exact, quadrature)
    means = print_new_digits(decoder, theta, unseen)

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    draw_plane(axes[0], quadrature, theta, decoder.codes(unseen))
    draw_digits(axes[1], "unseen digits", unseen)
    draw_digits(axes[2], "new, z ~ N(0, I)", means["N(0, I)"])
    draw_digits(axes[3], "new, z of the posterior", means["posterior"])
    figure.savefig(args.out / "latent_energy_digits.png", dpi=130)
    ebm.to_arviz(joint).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'latent_energy_digits.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
