"""Temperature scaling and calibration errors, against closed forms and published vectors."""

import math
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import native
from nanogpt.calibration import (
    PerTokenTemperature,
    TemperatureScaler,
    TokenStatistics,
    _moments,
    paired_difference,
)
from nanogpt.errors import UsageError
from nanogpt.reliability import calibration_report, wilson_interval


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Numbers as few as these are summed sooner by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _few_tokens_are_no_news():
    """Most cases here are of a handful of tokens; what warns of it has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the temperature was fitted to")
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_case(count: int = 3000, classes: int = 10, scale: float = 2.0, seed: int = 0):
    """Logits `scale` times too large, and labels drawn from the right ones."""
    g = generator(seed)
    right = 2 * torch.randn(count, classes, generator=g, dtype=torch.float64)
    labels = torch.multinomial(right.softmax(1), 1, generator=g)[:, 0]
    return scale * right, labels


def mean_nll(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    wide = logits.to(torch.float64) / temperature
    return float(torch.nn.functional.cross_entropy(wide, labels))


def one_logit(count: int, classes: int, height: float, right: int):
    """Class 0 has logit `height`, the others 0; it is right in the first `right` rows."""
    logits = torch.zeros(count, classes, dtype=torch.float64)
    logits[:, 0] = height
    labels = torch.ones(count, dtype=torch.int64)
    labels[:right] = 0
    return logits, labels


# The fit.


def test_d1_two_classes_with_one_margin():
    logits, labels = one_logit(4, 2, 4.0, right=3)
    scaler = TemperatureScaler().fit(logits, labels)
    assert scaler.temperature_ == pytest.approx(4 / math.log(3), abs=1e-6)
    before = calibration_report(logits.softmax(1), labels)
    assert before.ece == pytest.approx(0.232014, abs=1e-6)
    assert calibration_report(scaler.predict_proba(logits), labels).ece <= 1e-7


def test_d2_sixty_five_classes_with_one_logit():
    logits, labels = one_logit(2, 65, 5.0, right=1)
    scaler = TemperatureScaler().fit(logits, labels)
    assert scaler.temperature_ == pytest.approx(5 / math.log(64), abs=1e-6)
    before = calibration_report(logits.softmax(1), labels)
    assert before.confidence == pytest.approx(0.698700, abs=1e-6)
    assert before.ece == pytest.approx(0.198700, abs=1e-6)
    after = calibration_report(scaler.predict_proba(logits), labels)
    assert after.ece <= 1e-7
    assert after.entropy == pytest.approx(2.772589, abs=1e-6)
    assert after.nll == pytest.approx(2.772589, abs=1e-6)


def test_d3_a_known_temperature_is_recovered():
    logits, labels = random_case(20_000)
    scaler = TemperatureScaler().fit(logits, labels)
    assert scaler.temperature_se_ == pytest.approx(0.0143, abs=0.0004)
    assert abs(scaler.temperature_ - 2) <= 4 * scaler.temperature_se_
    assert scaler.passes_ <= 4
    assert scaler.n_tokens_ == 20_000
    before = calibration_report(logits.softmax(1), labels)
    after = calibration_report(scaler.predict_proba(logits), labels)
    assert before.ece == pytest.approx(0.2020, abs=0.01)
    assert after.ece < 0.0135
    assert after.is_consistent
    assert not before.is_consistent
    assert scaler.nll_before_ == pytest.approx(1.63147, abs=0.03)
    assert scaler.nll_after_ == pytest.approx(1.33753, abs=0.03)


built = pytest.mark.skipif(not native.available(), reason="the native engine is not built")


def hard_rows(count: int, classes: int) -> torch.Tensor:
    """Rows from narrow to wider than a double's exponent, with impossible classes."""
    g = generator(classes)
    z = torch.randn(count, classes, generator=g, dtype=torch.float64)
    z *= torch.logspace(-3, 300, count, dtype=torch.float64)[:, None]
    z[torch.rand(count, classes, generator=g) < 0.1] = -math.inf
    z[:, 0] = z[:, 0].clamp_min(-1e4)
    return z - z.amax(1, keepdim=True)


@built
@pytest.mark.parametrize("set_of_instructions", ["scalar", "avx2", "avx512", "avx512_bf16", "neon"])
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (3, 2), (40, 65), (5, 511), (2, 50_257)])
def test_the_engines_sums_are_those_of_torch(monkeypatch, set_of_instructions, count, classes):
    monkeypatch.setenv("NANOGPT_ISA", set_of_instructions)
    z = hard_rows(count, classes)
    shared = tensor(0.05, 0.7, 1.0, 20.0)
    try:
        found = [native.softmax_moments(z, shared)]
    except UsageError:
        pytest.skip(f"this CPU lacks {set_of_instructions}")
    own = shared * torch.rand(count, 1, generator=generator(), dtype=torch.float64)
    found.append(native.softmax_moments(z, own))
    monkeypatch.setattr(native, "available", lambda: False)
    for got, betas in zip(found, (shared, own), strict=True):
        want = _moments(z, betas)
        scale = (tensor(1.0), want[1].abs(), want[2] + want[1].square())
        for ours, theirs, size in zip(got, want, scale, strict=True):
            assert ours.shape == theirs.shape == (count, 4)
            assert bool(((ours - theirs).abs() <= 1e-13 * size).all())


@built
def test_the_engines_sums_do_not_depend_on_the_number_of_threads():
    z, betas = hard_rows(501, 65), tensor(0.3, 1.0)
    alone = native.softmax_moments(z, betas)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        try:
            among = native.softmax_moments(z, betas)
        finally:
            torch.set_num_threads(1)
        assert all(map(torch.equal, alone, among))


@built
@pytest.mark.parametrize("shapes", [((3,), (1,)), ((3, 0), (1,)), ((3, 2), (2, 1)), ((3, 2), ())])
def test_the_engine_refuses_shapes_that_do_not_fit(shapes):
    z, betas = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    with pytest.raises(UsageError, match="betas"):
        native.softmax_moments(z, betas)


@built
def test_fits_without_the_engine_are_the_same(monkeypatch):
    logits, labels = random_case(5_000)
    ours = TemperatureScaler().fit(logits, labels)
    features = PerTokenTemperature(ours.temperature_).fit_batches(lambda: [(logits, labels, None)])
    monkeypatch.setattr(native, "available", lambda: False)
    plain = TemperatureScaler().fit(logits, labels)
    assert plain.temperature_ == pytest.approx(ours.temperature_, rel=1e-11)
    assert plain.temperature_se_ == pytest.approx(ours.temperature_se_, rel=1e-9)
    again = PerTokenTemperature(ours.temperature_).fit_batches(lambda: [(logits, labels, None)])
    assert again.weights_ == pytest.approx(features.weights_, rel=1e-6)


@pytest.mark.parametrize("every_16th", [None, 6.0, 0.08, 1e-9])
@pytest.mark.parametrize("masked", [False, True])
def test_a_first_look_at_some_rows_changes_no_result(every_16th, masked):
    """Also where the rows that it looks at are unlike the others, or say nothing."""
    logits, labels = random_case(8_192)
    if every_16th is not None:
        logits[::16] *= every_16th
    mask = torch.ones(8_192, dtype=torch.bool)
    mask[1::3] = not masked
    scaler = TemperatureScaler().fit(logits, labels, mask)
    batches = list(zip(logits[mask].split(500), labels[mask].split(500), strict=True))
    exact = TemperatureScaler().fit_batches(lambda: [(*batch, None) for batch in batches])
    assert scaler.temperature_ == pytest.approx(exact.temperature_, rel=1e-11)
    assert scaler.temperature_se_ == pytest.approx(exact.temperature_se_, rel=1e-5)
    assert scaler.nll_after_ == pytest.approx(exact.nll_after_, rel=1e-12)
    assert scaler.nll_before_ == pytest.approx(exact.nll_before_, rel=1e-12)
    assert scaler.n_tokens_ == exact.n_tokens_ == int(mask.sum())
    assert scaler.passes_ <= (3 if every_16th is None else 6)


@pytest.mark.parametrize(("scale", "bound"), [(1e-3, "lower"), (1e3, "upper")])
def test_many_rows_end_at_the_bounds_of_the_range(scale, bound):
    logits, labels = random_case(8_192)
    with pytest.warns(UserWarning, match=f"its {bound} bound"):
        scaler = TemperatureScaler().fit(logits * scale, labels)
    assert scaler.bound_ == bound
    assert scaler.temperature_ == pytest.approx(0.05 if bound == "lower" else 20.0, rel=1e-12)


def test_rows_that_a_first_look_cannot_read_are_named_as_ever():
    logits, labels = random_case(8_192)
    labels[1], labels[16] = 97, 98
    with pytest.raises(ValueError, match="the label 97 is outside"):
        TemperatureScaler().fit(logits, labels)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.7])
@pytest.mark.parametrize("seed", range(3))
def test_d4_at_the_minimum_the_slope_is_zero_and_entropy_is_nll(seed, scale):
    logits, labels = random_case(500, 7, scale, seed)
    scaler = TemperatureScaler().fit(logits, labels)
    q = (logits / scaler.temperature_).softmax(1)
    slope = ((q * logits).sum(1) - logits.gather(1, labels[:, None])[:, 0]).mean()
    assert abs(float(slope)) <= 1e-9 * float(logits.abs().mean())
    entropy = float(torch.special.entr(q).sum(1).mean())
    assert entropy == pytest.approx(mean_nll(logits, labels, scaler.temperature_), abs=1e-9)


def test_d5_shifts_change_nothing_and_scales_scale_the_temperature():
    logits, labels = random_case(400, 6)
    found = TemperatureScaler().fit(logits, labels).temperature_
    shifts = 50 * torch.randn(400, 1, generator=generator(1), dtype=torch.float64)
    assert TemperatureScaler().fit(logits + shifts, labels).temperature_ == pytest.approx(found)
    for scale in (0.2, 1.7, 5.0):
        again = TemperatureScaler().fit(scale * logits, labels).temperature_
        assert again == pytest.approx(scale * found, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 10.0])
def test_d5_every_row_keeps_its_ranking(temperature):
    logits, labels = random_case(200, 20)
    scaler = TemperatureScaler().fit(logits * temperature / 2, labels)
    assert scaler.temperature_ == pytest.approx(temperature, rel=0.3)
    ranked = scaler.transform(logits).argsort(1)
    assert torch.equal(ranked, logits.argsort(1))


@pytest.mark.parametrize("seed", range(4))
def test_d6_no_temperature_is_better_and_the_nll_is_convex_in_beta(seed):
    logits, labels = random_case(150, 5, scale=(0.4, 1.0, 2.0, 6.0)[seed], seed=seed)
    scaler = TemperatureScaler().fit(logits, labels)
    best = mean_nll(logits, labels, scaler.temperature_)
    assert best == pytest.approx(scaler.nll_after_, abs=1e-12)
    grid = torch.logspace(math.log10(0.05), math.log10(20), 200, dtype=torch.float64).tolist()
    assert all(best <= mean_nll(logits, labels, t) + 1e-12 for t in grid)
    assert scaler.nll_after_ <= scaler.nll_before_
    betas = torch.linspace(0.05, 20, 200, dtype=torch.float64).tolist()
    values = tensor(*(mean_nll(logits, labels, 1 / beta) for beta in betas))
    assert float(values.diff().diff().min()) >= -1e-9


def test_d6_a_model_that_is_right_stays_as_it_is():
    """A hundred fits near T = 1: the NLL is never a bit above that at 1."""
    for seed in range(100):
        logits, labels = random_case(60, 4, 1.0, seed)
        scaler = TemperatureScaler().fit(logits, labels)
        assert scaler.nll_after_ <= scaler.nll_before_


def test_d6_a_temperature_so_near_to_one_that_rounding_decides_is_no_worse():
    for seed in range(60):
        logits, labels = random_case(50, 4, 2.0, seed)
        found = TemperatureScaler().fit(logits, labels).temperature_
        scaler = TemperatureScaler().fit(logits / (found * (1 + 1e-9)), labels)
        assert scaler.temperature_ == pytest.approx(1, abs=2e-9)
        assert scaler.nll_after_ <= scaler.nll_before_


def test_d7_only_right_tokens_end_at_the_lower_bound():
    for height in (3.0, 80.0):  # at 80 every probability but one underflows at beta 20
        logits, labels = one_logit(50, 4, height, right=50)
        with pytest.warns(UserWarning, match=r"lower bound, 0\.05"):
            scaler = TemperatureScaler().fit(logits, labels)
        assert scaler.temperature_ == pytest.approx(0.05)
        assert scaler.bound_ == "lower"
        assert scaler.temperature_se_ == math.inf
        assert scaler.nll_after_ <= scaler.nll_before_


def test_d7_worse_than_chance_ends_at_the_upper_bound_and_keeps_the_order():
    logits, labels = one_logit(50, 4, 3.0, right=2)
    with pytest.warns(UserWarning, match="upper bound, 20"):
        scaler = TemperatureScaler().fit(logits, labels)
    assert scaler.temperature_ == pytest.approx(20)
    assert scaler.bound_ == "upper"
    assert torch.equal(scaler.transform(logits).argmax(1), logits.argmax(1))


def test_d7_no_token_is_an_error():
    nothing = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="no tokens"):
        TemperatureScaler().fit(*nothing)
    with pytest.raises(ValueError, match="no tokens"):
        TemperatureScaler().fit(
            torch.ones(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="no tokens"):
        TemperatureScaler().fit_batches(list)
    with pytest.raises(ValueError, match="no tokens"):
        calibration_report(torch.empty(0), torch.empty(0))


def test_logits_that_say_nothing_leave_the_temperature_at_one():
    scaler = TemperatureScaler().fit(torch.zeros(9, 5), torch.arange(9) % 5)
    assert scaler.temperature_ == 1.0
    assert scaler.bound_ is None
    assert scaler.temperature_se_ == math.inf
    assert scaler.nll_after_ == pytest.approx(math.log(5))


def test_impossible_classes_count_nothing():
    logits, labels = random_case(300, 6)
    wider = torch.cat([logits, torch.full((300, 3), -math.inf, dtype=torch.float64)], 1)
    plain, wide = TemperatureScaler().fit(logits, labels), TemperatureScaler().fit(wider, labels)
    assert wide.temperature_ == pytest.approx(plain.temperature_, rel=1e-12)
    assert wide.temperature_se_ == pytest.approx(plain.temperature_se_, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, y: (z, y - 1), "outside the vocabulary"),
        (lambda z, y: (z, y + 5), "outside the vocabulary"),
        (lambda z, y: (z.masked_fill(z == z.max(), math.nan), y), "NaN"),
        (lambda z, y: (z.masked_fill(z == z.max(), math.inf), y), "infinity"),
        (lambda z, y: (torch.full_like(z, -math.inf), y), "infinity"),
        (lambda z, y: (z.scatter(1, y[:, None], -math.inf), y), "not of a label"),
        (lambda z, y: (z[:-1], y), r"must be \(N, V\)"),
        (lambda z, y: (z[None], y), r"must be \(N, V\)"),
        (lambda z, y: (z[:, :0], y), "no classes"),
        (lambda z, y: (z.long(), y), "floating"),
        (lambda z, y: (z, y.double()), "whole numbers"),
        (lambda z, y: (z, y > 1), "whole numbers"),
    ],
)
def test_bad_input_is_named(change, message):
    logits, _ = random_case(20, 5)
    labels = torch.zeros(20, dtype=torch.int64)
    labels[3] = 1
    with pytest.raises(ValueError, match=message):
        TemperatureScaler().fit(*change(logits, labels))


def test_a_scaler_without_a_fit_says_so():
    with pytest.raises(ValueError, match="call fit first"):
        TemperatureScaler().transform(torch.zeros(1, 2))


def test_few_tokens_warn_with_the_standard_error():
    logits, labels = random_case(999, 5)
    with pytest.warns(UserWarning, match=r"fitted to 999 tokens, fewer than 1,000: 2\.0\d+, "
                      r"standard error 0\.\d+"):  # fmt: skip
        TemperatureScaler().fit(logits, labels)
    logits, labels = random_case(1000, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TemperatureScaler().fit(logits, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_widened_first(dtype):
    logits, labels = random_case(300, 5)
    narrow = logits.to(dtype)
    scaler = TemperatureScaler().fit(narrow, labels)
    exact = TemperatureScaler().fit(narrow.double(), labels)
    assert scaler.temperature_ == exact.temperature_
    assert scaler.predict_proba(narrow).dtype == torch.float32
    assert scaler.predict_proba(logits).dtype == torch.float64


def test_the_standard_error_is_the_spread_of_fits():
    """Independent tokens: 200 samples of 500, whose T scatters as the formula says."""
    found, errors = [], []
    for seed in range(200):
        scaler = TemperatureScaler().fit(*random_case(500, 5, 2.0, seed))
        found.append(scaler.temperature_)
        errors.append(scaler.temperature_se_)
    spread = float(tensor(*found).std())
    assert spread == pytest.approx(sum(errors) / len(errors), rel=0.15)


def test_the_standard_error_by_groups_sees_what_depends_on_each_other():
    """Every token ten times over: the error by groups does not believe in ten times the data."""
    logits, labels = random_case(400, 5)
    once = TemperatureScaler().fit(logits, labels)
    tenfold = logits.repeat_interleave(10, 0), labels.repeat_interleave(10)
    naive = TemperatureScaler().fit(*tenfold)
    groups = torch.arange(400).repeat_interleave(10)
    grouped = TemperatureScaler().fit_batches(lambda: [(*tenfold, groups)])
    assert naive.temperature_se_ == pytest.approx(once.temperature_se_ / math.sqrt(10), rel=1e-9)
    assert grouped.temperature_ == pytest.approx(once.temperature_, rel=1e-9)
    assert grouped.temperature_se_ == pytest.approx(once.temperature_se_, rel=0.2)


# Streams and memory.


def in_batches(logits, labels, groups=None, size=37):
    def batches():
        for first in range(0, len(logits), size):
            part = slice(first, first + size)
            yield logits[part], labels[part], None if groups is None else groups[part]

    return batches


def test_d14_a_stream_is_the_full_batch():
    logits, labels = random_case(2000, 9)
    groups = torch.arange(2000) // 16
    whole = TemperatureScaler().fit_batches(lambda: [(logits, labels, groups)])
    streamed = TemperatureScaler().fit_batches(in_batches(logits, labels, groups))
    for name in ("temperature_", "temperature_se_", "nll_before_", "nll_after_"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    assert streamed.n_tokens_ == whole.n_tokens_ == 2000
    assert streamed.temperature_ == pytest.approx(
        TemperatureScaler().fit(logits, labels).temperature_, rel=1e-9
    )


def test_d14_masked_tokens_do_not_count():
    logits, labels = random_case(500, 6)
    mask = torch.rand(500, generator=generator(3)) < 0.5
    only = TemperatureScaler().fit(logits[mask], labels[mask])
    # What is left out may hold anything, as prompts and padding do.
    logits[~mask], labels[~mask] = math.nan, -100
    masked = TemperatureScaler().fit(logits, labels, mask)
    assert masked.temperature_ == pytest.approx(only.temperature_, rel=1e-12)
    assert masked.n_tokens_ == int(mask.sum())
    with pytest.raises(ValueError, match="mask must be"):
        TemperatureScaler().fit(logits, labels, mask.long())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and notes the most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            is_new = isinstance(each, torch.Tensor) and not any(each is one for one in args)
            if is_new and not each._is_view():
                self.live += each.nbytes
                weakref.finalize(each, self._release, each.nbytes)
        self.peak = max(self.peak, self.live)
        return out

    def _release(self, size):
        self.live -= size


def stream_of(count, classes, batch):
    """Logits that are right two times in five and more, made anew for every pass."""

    def batches():
        for index in range(count // batch):
            g = generator(index)
            logits = torch.randn(batch, classes, generator=g)
            labels = torch.randint(classes, (batch,), generator=g)
            labels = torch.where(torch.rand(batch, generator=g) < 0.4, logits.argmax(1), labels)
            yield logits, labels, torch.full((batch,), index)

    return batches


def peak_of_a_calibration(batches, count):
    """Most bytes alive while a temperature is fitted and judged."""
    with LiveBytes() as memory:
        scaler = TemperatureScaler().fit_batches(batches)
        statistics = TokenStatistics(scaler.temperature_)
        for each in batches():
            statistics.add(*each)
        report = statistics.report()
    assert scaler.n_tokens_ == report.n_tokens == count
    assert report.entropy_gap == pytest.approx(0, abs=1e-6)
    return memory.peak


def test_no_pass_holds_the_logits_of_all_tokens():
    batches = stream_of(20_000, 200, 500)
    with LiveBytes() as all_at_once:
        kept = list(batches())
    of_all = 20_000 * 200 * 4
    assert all_at_once.peak > of_all
    del kept
    assert peak_of_a_calibration(batches, 20_000) < 0.5 * of_all


@pytest.mark.slow
def test_a_million_tokens_of_a_vocabulary_of_96_never_lie_in_memory():
    peak = peak_of_a_calibration(stream_of(1_000_000, 96, 10_000), 1_000_000)
    assert peak < 0.6 * 1_000_000 * 96 * 4


def test_what_is_gathered_is_the_report_on_all_probabilities():
    logits, labels = random_case(700, 8)
    statistics = TokenStatistics(1.5)
    for each in in_batches(logits, labels, torch.arange(700) // 10)():
        statistics.add(*each)
    gathered = statistics.report().as_dict()
    direct = calibration_report((logits / 1.5).softmax(1), labels).as_dict()
    for name in ("ece_interval", "risk_coverage", "bins"):
        gathered.pop(name), direct.pop(name)
    assert gathered == pytest.approx(direct, rel=1e-5, abs=1e-6)
    assert statistics.nll.mean() == pytest.approx(mean_nll(logits, labels, 1.5))


# The metrics.


def test_d8_published_vectors_of_torchmetrics():
    binary = calibration_report(
        tensor(0.25, 0.25, 0.55, 0.75, 0.75), tensor(0, 0, 1, 1, 1), n_bins=2
    )
    assert binary.ece == pytest.approx(0.2900, abs=5e-5)
    assert binary.rmsce == pytest.approx(0.2918, abs=5e-5)
    assert binary.mce == pytest.approx(0.3167, abs=5e-5)
    many = calibration_report(tensor(0.55, 0.55, 0.60, 0.90), tensor(0, 0, 1, 1), n_bins=3)
    assert many.ece == pytest.approx(0.2000, abs=5e-5)
    assert many.rmsce == pytest.approx(0.2082, abs=5e-5)
    assert many.mce == pytest.approx(0.2333, abs=5e-5)


def test_d9_edges_land_in_real_bins():
    top = calibration_report(tensor(0.95, 1.0), tensor(1, 0), n_bins=10)
    assert top.ece == pytest.approx(0.475)
    assert top.bins[-1].count == 2
    zero = calibration_report(tensor(0.0), tensor(1), n_bins=10)
    assert zero.ece == 1.0
    assert zero.bins[0].count == 1
    edges = torch.arange(11, dtype=torch.float64) / 10
    report = calibration_report(edges, torch.ones(11), n_bins=10)
    assert [each.count for each in report.bins] == [2, *[1] * 9]
    assert sum(each.count for each in report.bins) == report.n_tokens
    last_only = calibration_report(tensor(0.99, 0.98), tensor(1, 0), n_bins=10)
    assert last_only.ece == pytest.approx(0.485)


@pytest.mark.parametrize(
    ("count", "mean", "formula"),
    [(10**3, 0.0415, 0.0384), (10**4, 0.0122, 0.0121), (10**5, 0.0039, 0.0038)],
)
def test_d10_noise_alone_has_the_ece_that_the_floor_says(count, mean, formula):
    assert math.sqrt(2 / math.pi) * math.sqrt(15 / count) * math.pi / 8 == pytest.approx(
        formula, abs=6e-5
    )
    reports = []
    for seed in range(20):
        g = generator(seed)
        confidence = torch.rand(count, generator=g, dtype=torch.float64)
        correct = torch.rand(count, generator=g, dtype=torch.float64) < confidence
        reports.append(calibration_report(confidence, correct, resamples=100))
    seen = sum(report.ece for report in reports) / 20
    assert seen == pytest.approx(formula, rel=0.2)
    assert seen == pytest.approx(mean, rel=0.15)
    assert reports[0].ece_floor == pytest.approx(formula, rel=0.05)
    # Three deviations are passed once in 300 samples, as the sum's tail is a little heavy.
    assert sum(abs(report.ece_z) < 3 for report in reports) >= 19
    assert sum(report.is_consistent for report in reports) >= 19
    assert all(abs(report.ece_z) < 4 for report in reports)
    # A model that is off by three floors is not consistent.
    off = calibration_report((confidence * (1 - 8 * formula)), correct, resamples=100)
    assert not off.is_consistent


def test_the_floor_holds_where_the_confidences_are_not_uniform():
    """Skewed confidences: mean and deviation of the ece over 300 samples, bins of all sizes."""
    confidence = torch.rand(2000, generator=generator(1), dtype=torch.float64) ** 3
    found = []
    for seed in range(300):
        correct = torch.rand(2000, generator=generator(seed + 2), dtype=torch.float64) < confidence
        report = calibration_report(confidence, correct, resamples=2)
        found.append(report.ece)
    assert float(tensor(*found).mean()) == pytest.approx(report.ece_floor, rel=0.05)
    assert float(tensor(*found).std()) == pytest.approx(report.ece_floor_sd, rel=0.15)


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.1])
def test_the_interval_covers_the_calibration_error(shift):
    """Confidences too low by `shift`: the error without noise is `shift` in every bin."""
    covered = 0
    for seed in range(60):
        g = generator(seed)
        confidence = 0.2 + 0.6 * torch.rand(1500, generator=g, dtype=torch.float64)
        correct = torch.rand(1500, generator=g, dtype=torch.float64) < confidence + shift
        low, high = calibration_report(confidence, correct, resamples=300).ece_interval
        covered += low <= shift <= high
    assert covered >= 54


def test_the_interval_by_groups_is_wider_where_groups_hang_together():
    g = generator(0)
    confidence = torch.full((2000,), 0.7, dtype=torch.float64)
    right = (torch.rand(100, generator=g) < 0.5).double().repeat_interleave(20)
    groups = torch.arange(100).repeat_interleave(20)
    alone = calibration_report(confidence, right).ece_interval
    together = calibration_report(confidence, right, groups=groups).ece_interval
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_d11_bins_of_equal_counts():
    confidence = tensor(0.91, 0.92, 0.93, 0.94, 0.99, 0.99, 0.99, 0.99)
    correct = tensor(1, 1, 0, 1, 1, 1, 1, 1)
    assert calibration_report(confidence, correct, n_bins=10).ece == pytest.approx(0.0825)
    assert calibration_report(confidence, correct, n_bins=2).adaptive_ece == pytest.approx(0.0925)
    assert calibration_report(confidence, correct, n_bins=50).adaptive_ece <= 1
    same = calibration_report(torch.full((8,), 0.5), correct)
    assert same.adaptive_ece >= same.ece


def test_d12_the_parts_of_the_brier_score():
    confidence = tensor(0.2, 0.7).repeat_interleave(10)
    correct = torch.zeros(20)
    correct[:3], correct[10:16] = 1, 1
    report = calibration_report(confidence, correct)
    assert report.brier_top == pytest.approx(0.235, abs=1e-12)
    assert report.reliability == pytest.approx(0.01, abs=1e-12)
    assert report.resolution == pytest.approx(0.0225, abs=1e-12)
    assert report.uncertainty == pytest.approx(0.2475, abs=1e-12)


def test_d13_confidences_of_more_than_two_classes_may_change_their_order():
    logits = tensor(3, 2.9, -9, 2, 0.9, 0.9).view(2, 3)
    at_1, at_5 = ((logits / t).softmax(1).max(1).values.tolist() for t in (1, 5))
    assert at_1 == pytest.approx([0.5250, 0.6003], abs=5e-5)
    assert at_5 == pytest.approx([0.4829, 0.3839], abs=5e-5)
    labels = torch.tensor([0, 1])
    before = calibration_report((logits / 1).softmax(1), labels).auroc
    after = calibration_report((logits / 5).softmax(1), labels).auroc
    assert (before, after) == (0.0, 1.0)
    two, right = random_case(300, 2)
    aurocs = [calibration_report((two / t).softmax(1), right).auroc for t in (0.5, 1, 5)]
    assert aurocs == pytest.approx([aurocs[0]] * 3, abs=1e-12)


def test_both_brier_scores_nll_and_entropy_by_hand():
    probabilities = tensor(0.7, 0.2, 0.1, 0.1, 0.6, 0.3).view(2, 3)
    report = calibration_report(probabilities, torch.tensor([0, 2]))
    assert report.accuracy == 0.5
    assert report.brier_top == pytest.approx((0.3**2 + 0.6**2) / 2)
    assert report.brier == pytest.approx((0.09 + 0.04 + 0.01 + 0.01 + 0.36 + 0.49) / 2)
    assert report.nll == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    by_hand = -sum(p * math.log(p) for p in probabilities.flatten().tolist()) / 2
    assert report.entropy == pytest.approx(by_hand)
    assert report.entropy_gap == pytest.approx(by_hand - report.nll)


def test_auroc_counts_pairs_and_ties_as_half():
    confidence, correct = tensor(0.1, 0.4, 0.4, 0.8, 0.9), tensor(0, 1, 0, 1, 0)
    pairs = [
        (c1 > c0) + 0.5 * (c1 == c0)
        for c1, y1 in zip(confidence.tolist(), correct.tolist(), strict=True)
        for c0, y0 in zip(confidence.tolist(), correct.tolist(), strict=True)
        if y1 and not y0
    ]
    report = calibration_report(confidence, correct)
    assert report.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert calibration_report(confidence, torch.ones(5)).auroc is None
    assert calibration_report(confidence, torch.zeros(5)).auroc is None


def test_risk_and_coverage_by_hand_whatever_the_order_of_ties():
    confidence, correct = tensor(0.9, 0.8, 0.8, 0.2), tensor(1, 1, 0, 0)
    # Errors 0, then half of each of the two ties, then 1: risks 0, 1/4, 1/3, 1/2.
    expected = (0, 0.25, 1 / 3, 0.5)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 1, 3]):
        report = calibration_report(confidence[order], correct[order])
        assert report.aurc == pytest.approx(sum(expected) / 4)
        assert [risk for _, risk in report.risk_coverage] == pytest.approx(list(expected))
        assert [share for share, _ in report.risk_coverage] == pytest.approx([0.25, 0.5, 0.75, 1])


def test_wilsons_interval_is_the_textbooks():
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 1)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tensor(0.5, 1.5), tensor(1, 0)), "not logits"),
        ((tensor(-0.1), tensor(1)), "not logits"),
        ((tensor(math.nan), tensor(1)), "not logits"),
        ((torch.tensor([[3.0, -1.0]]), torch.tensor([0])), "softmax"),
        ((torch.tensor([[0.5, 0.4]]), torch.tensor([0])), "sum to 1"),
        ((torch.tensor([[0.5, 0.5]]), torch.tensor([2])), "labels must be in"),
        ((tensor(0.5), tensor(0.5)), "True and False"),
        ((tensor(0.5, 0.5), tensor(1)), r"must be \(N,\)"),
    ],
)
def test_logits_are_never_taken_for_probabilities(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibration_report(*arguments)
    with pytest.raises(ValueError, match="a bin at least"):
        calibration_report(tensor(0.5), tensor(1), n_bins=0)


def test_a_report_is_json_whatever_it_holds():
    import json

    report = calibration_report(tensor(1.0, 1.0), tensor(1, 0))
    assert report.ece_z == math.inf
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["ece_z"] is None
    assert content["is_consistent"] is False


# A temperature for each token.


def test_d15_a_head_of_zeros_is_the_global_temperature_exactly():
    logits, _ = random_case(300, 6)
    scaler = TemperatureScaler()
    scaler.temperature_ = 2.0
    head = PerTokenTemperature(2.0)
    assert torch.equal(head.temperatures(logits), torch.full((300,), 2.0, dtype=torch.float64))
    assert torch.equal(head.predict_proba(logits), scaler.predict_proba(logits))


def test_d15_with_constant_features_its_optimum_is_the_global_one():
    logits, labels = one_logit(40, 5, 6.0, right=24)
    # Every row holds the same numbers in another order, so that the features cannot differ.
    scaler = TemperatureScaler().fit(logits, labels)
    head = PerTokenTemperature(1.0).fit_batches(lambda: [(logits, labels, None)])
    found = head.temperatures(logits)
    assert float(found.max() - found.min()) < 1e-12
    assert float(found[0]) == pytest.approx(scaler.temperature_, rel=1e-4)


def two_kinds(count: int, seed: int):
    """Half of the tokens, those with the larger logits, are three times too confident."""
    logits, labels = random_case(count, 8, 1.0, seed)
    too_large = torch.arange(count) % 2 == 0
    return torch.where(too_large[:, None], 3 * logits, logits), labels


def test_d15_a_head_is_kept_where_tokens_differ_and_only_there():
    def judged(case):
        fit, test = (case(4000, seed) for seed in (0, 1))
        scaler = TemperatureScaler().fit(*fit)
        head = PerTokenTemperature(scaler.temperature_).fit_batches(lambda: [(*fit, None)])
        before, after = TokenStatistics(scaler.temperature_), TokenStatistics(head)
        before.add(*test)
        after.add(*test)
        own = head.predict_proba(test[0]).gather(1, test[1][:, None])[:, 0]
        assert torch.allclose(after.nll, -own.log())
        return head, paired_difference(before.nll, after.nll)

    head, change = judged(two_kinds)
    assert change.is_worth_it
    large, small = (head.temperatures(two_kinds(4000, 1)[0])[part::2].mean() for part in (0, 1))
    assert large / small == pytest.approx(3, rel=0.2)
    _, change = judged(lambda count, seed: random_case(count, 8, 2.0, seed))
    assert not change.is_worth_it


def test_the_fit_of_a_head_is_the_optimum_that_autograd_finds():
    logits, labels = two_kinds(1500, 0)
    head = PerTokenTemperature(2.0).fit_batches(in_batches(logits, labels))
    assert head.passes_ <= 8
    top = logits.topk(2, dim=1).values
    q = (logits / 2.0).softmax(1)
    features = torch.stack(
        [
            torch.ones(1500, dtype=torch.float64),
            logits.std(1, correction=0).log(),
            top[:, 0] - top[:, 1],
            torch.special.entr(q).sum(1),
        ],
        1,
    )
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )  # fmt: skip

    def loss():
        optimizer.zero_grad()
        temperatures = 2.0 * (features @ weights).exp()
        value = torch.nn.functional.cross_entropy(logits / temperatures[:, None], labels)
        value.backward()
        return value

    optimizer.step(loss)
    assert head.weights_ == pytest.approx(weights.tolist(), abs=1e-4)


def test_the_fit_of_a_head_never_raises_the_nll():
    for seed in range(5):
        logits, labels = random_case(200, 6, (0.2, 1, 3, 9, 30)[seed], seed)
        head = PerTokenTemperature(1.0).fit_batches(in_batches(logits, labels))
        at_one, own = TokenStatistics(), TokenStatistics(head)
        at_one.add(logits, labels)
        own.add(logits, labels)
        assert float(own.nll.mean()) <= float(at_one.nll.mean())
        assert head.passes_ < 30


def test_a_head_refuses_what_is_no_temperature():
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            PerTokenTemperature(bad)
    with pytest.raises(ValueError, match="four finite weights"):
        PerTokenTemperature(1.0, [1.0, 2.0])


def test_a_paired_difference_knows_its_error_by_groups():
    before = torch.randn(1000, generator=generator(0), dtype=torch.float64)
    noise = torch.randn(100, generator=generator(1), dtype=torch.float64).repeat_interleave(10)
    after = before - 0.5 + noise
    groups = torch.arange(100).repeat_interleave(10)
    by_groups = paired_difference(before, after, groups)
    assert by_groups.mean == pytest.approx(float((after - before).mean()))
    assert by_groups.standard_error == pytest.approx(float(noise[::10].std()) / 10, rel=1e-9)
    assert by_groups.is_worth_it
    alone = paired_difference(before, after)
    assert alone.standard_error == pytest.approx(by_groups.standard_error / 10**0.5, rel=0.02)
    single = paired_difference(before, after, torch.zeros(1000, dtype=torch.int64))
    assert single.standard_error == math.inf
    assert not single.is_worth_it
    with pytest.raises(ValueError, match="same tokens"):
        paired_difference(before, after[:-1])
