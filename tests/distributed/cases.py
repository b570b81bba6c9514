"""What holds of synchronized batch norm in every process; each case is called by all of them together.

The oracle is the norm of the whole batch in float64, in one process; parameters' gradients are compared summed over the processes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import normfused as nf
from normfused import distributed as exchange
from normfused import functional as nF
from tests.conftest import BACKENDS
from tests.contract.test_memory import saved
from tests.support.check import DEVICE, HALF, OUTPUT, arguments, close, data, layout, parameter_tolerance
from tests.support.formulas import ACT_NUMBERS, BY_NAME, activation

from .processes import SIZE

BATCH = BY_NAME["batch"]
NAMES = [name for name in BACKENDS if name != "torch_steps"]
UNEVEN, EMPTY, EVEN = (3, 1, 2), (4, 0, 3), (2, 2, 2)
MAPS = {2: (), 3: (7,), 4: (5, 3), 5: (2, 3, 2)}
CASES: dict[str, Callable[[int], None]] = {}


def case(function: Callable[[int], None]) -> Callable[[int], None]:
    CASES[function.__name__] = function
    return function


def summed(t: Tensor, group=None) -> Tensor:
    """The sum over the processes, in float64."""
    total = t.detach().double().clone()
    distributed.all_reduce(total, group=group)
    return total


def like_one_batch(rank, sizes, shape, dtype, form, act, mode, name, parameter_dtype=None, mean=True, **more):
    """y and all gradients of a call against the oracle on the whole batch."""
    full = (sum(sizes), *shape)
    a = arguments(BATCH, full, dtype, parameter_dtype, act=act, mode=mode)
    x = data(full, dtype, mean)
    dy = torch.randn(full, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype).to(DEVICE)
    own = {"x": layout(x.split(sizes)[rank], form).requires_grad_()}
    if a.residual is not None:
        own["residual"] = layout(a.residual.detach().split(sizes)[rank], "contiguous").requires_grad_()
    own |= {n: t for n, t in (("weight", a.weight), ("bias", a.bias), ("act_weight", a.act_weight)) if t is not None}
    numbers = ACT_NUMBERS.get(act)
    y = nF.sync_batch_norm_act(
        own["x"], None, None, a.weight, a.bias, True, act=(act, numbers) if numbers else act, act_param=a.act_weight,
        residual=own.get("residual"), residual_mode=mode or "pre_act", backend=name, **more,
    )  # fmt: skip
    found = dict(zip(own, torch.autograd.grad(y, list(own.values()), dy.split(sizes)[rank]), strict=True))

    x64, a64 = x.double().requires_grad_(), a.wide()
    y64, _, z64, p64 = BATCH.oracle(x64, a64)
    wide = {"x": x64, **a64.named()}
    expected = dict(zip(own, torch.autograd.grad(y64, [wide[n] for n in own], dy.double()), strict=True))
    z = z64.detach().requires_grad_()
    (dz,) = torch.autograd.grad(activation(act, z, BATCH.broadcast(a64.act_weight, full)), z, dy.double())
    what = f"{sizes} {shape} {dtype} {form} {act} {mode} {name}"
    assert y.dtype == dtype and (y.stride() == own["x"].stride() or form == "slice")
    close(f"{what}: y", y, y64.split(sizes)[rank], OUTPUT[dtype], scale=float(y64.detach().abs().max()))
    for n, gradient in found.items():
        assert gradient.dtype == own[n].dtype
        if n in ("x", "residual"):
            scale = float((p64 * dz).abs().max()) if n == "x" else float(dz.abs().max())
            close(f"{what}: d{n}", gradient, expected[n].split(sizes)[rank], OUTPUT[dtype], scale=scale)
        else:
            close(f"{what}: d{n}", summed(gradient), expected[n], parameter_tolerance(dtype, own[n].dtype))


@case
def one_batch_pairwise(rank):
    """Types, dimensions, layouts, activations, residuals, sizes: every value of each with several of the others."""
    acts = ("identity", "relu", "silu", "prelu", "tlu", "gelu", "elu", "leaky_relu")
    modes = (None, "pre_act", "post_act")
    dtypes = (torch.float32, torch.float64, *HALF)
    forms = ("contiguous", "channels_last", "slice")
    for i, (dtype, dims) in enumerate(itertools.product(dtypes, MAPS)):
        for j in range(3):
            k = i * 3 + j
            sizes, form, name = (UNEVEN, EMPTY, EVEN)[(i + j) % 3], forms[(j + i // 4) % 3], NAMES[k % len(NAMES)]
            form = "contiguous" if dims == 2 or 0 in sizes else form
            like_one_batch(rank, sizes, (6, *MAPS[dims]), dtype, form, acts[k % 8], modes[(k // 2) % 3], name)
    for form, dtype in itertools.product(forms, HALF):
        like_one_batch(rank, UNEVEN, (6, 4, 4), dtype, form, "relu", "pre_act", NAMES[0], torch.float32)
    like_one_batch(rank, (1, 1, 1), (1,), torch.float32, "contiguous", "identity", None, NAMES[0])


@case
def keeping_y(rank):
    """memory_efficient=True: the same gradients from y, which alone is kept, an empty batch among others, compiled too."""
    for name, (act, form) in itertools.product(NAMES, (("identity", "channels_last"), ("leaky_relu", "contiguous"))):
        like_one_batch(rank, UNEVEN, (6, 5, 3), torch.float32, form, act, None, name, memory_efficient=True)
    like_one_batch(rank, EMPTY, (6, 5, 3), torch.float64, "contiguous", "leaky_relu", None, NAMES[0], memory_efficient=True)
    layer = nf.SyncBatchNormAct.from_batch_norm(nf.BatchNormAct2d(6, act="leaky_relu", memory_efficient=True))
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    named, y = saved(lambda: layer(x), x, None, layer)
    assert named.pop("other") < 100 and named == {"y": x.numel() * 4}
    assert layer.memory_efficient and "near_zero" not in layer.state_dict()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="keeps no x to differentiate a second time"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="got a residual in mode 'pre_act'"):
        layer(x, x)
    nn.init.zeros_(layer.weight)
    layer._looked_at_weights = False
    with pytest.raises(ValueError, match=r"SyncBatchNormAct\(.*got weight 0 and bias 0 in channel 0"):
        layer(x)


@case
def means_that_differ_between_processes(rank):
    """Chan's formula keeps the variance where the parts lie 1000 standard deviations from zero, and far from one another."""
    for name in NAMES:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(6, 3, 40, generator=g, dtype=torch.float64)
        x += torch.tensor([1000.0, 1001.0, 1003.0], dtype=torch.float64).repeat_interleave(2).view(6, 1, 1)
        x = x.float().to(DEVICE)
        running = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
        y = nF.sync_batch_norm_act(x.split(2)[rank], *running, training=True, momentum=1.0, backend=name)
        wide = x.double()
        var, mean = torch.var_mean(wide, (0, 2), correction=1, keepdim=True)
        close("y", y, ((wide - mean) / (var * 239 / 240 + 1e-5).sqrt()).split(2)[rank], 1e-3)
        # a process's mean is rounded to 2^-15, half a unit at 1000; it enters twice by its distance from the others', at most 2
        close("variance", running[1], var.flatten(), 2 * 2 * 2.0**-15, scale=1.0)
        close("mean", running[0], mean.flatten(), 2.0**-23)


def layer_and_big(rank, sizes=EMPTY, group=None, shape=(6, 4, 3), steps=3, name=None, dtype=torch.float32, **options):
    """A synchronized layer after some steps, and torch's batch norm after the same steps with all of the group's samples."""
    layer = nf.SyncBatchNormAct(6, process_group=group, backend=name, device=DEVICE, dtype=dtype, **options)
    big = nn.BatchNorm2d(6, device=DEVICE, dtype=torch.float64, **options)
    for step in range(steps):
        x = torch.randn(sum(sizes), *shape, generator=torch.Generator().manual_seed(step)).to(dtype).to(DEVICE) * (step + 1) + step
        layer(x.split(sizes)[rank])
        big(x.double())
    return layer, big


@case
def running_statistics(rank):
    """Unbiased by the global count, momentum and cumulative average, the same bits everywhere."""
    for name, momentum in itertools.product(NAMES, (0.1, None)):
        layer, big = layer_and_big(rank, momentum=momentum, name=name)
        for key, value in layer.state_dict().items():
            close(key, value, big.state_dict()[key], 1e-6)
            gathered = [torch.empty_like(value) for _ in range(SIZE)]
            distributed.all_gather(gathered, value)
            assert all(torch.equal(value, other) for other in gathered), key
    half, big = layer_and_big(rank, dtype=torch.float16)
    assert half.running_var.dtype == torch.float16
    close("float16 statistics", half.running_var, big.running_var, 3 * 2.0**-11)
    untracked = nf.SyncBatchNormAct(6, track_running_stats=False, device=DEVICE)
    assert untracked(torch.randn(2, 6, 3, device=DEVICE)).shape == (2, 6, 3)


@case
def too_few_values(rank):
    """One value per channel among all processes, or none: y is the bias, and statistics stay as they were."""
    for sizes in ((0, 1, 0), (0, 0, 0)):
        layer = nf.SyncBatchNormAct(4, device=DEVICE)
        nn.init.constant_(layer.bias, 0.5)
        x = torch.randn(sizes[rank], 4, device=DEVICE, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        # scale*x + shift: two roundings of 1/sqrt(eps)*x
        assert bool(((y - 0.5).abs() <= 2.0**-23 * (x.abs() * 1e-5**-0.5 + 1)).all()) and torch.equal(x.grad, torch.zeros_like(x))
        assert torch.equal(layer.running_mean, torch.zeros(4)) and torch.equal(layer.running_var, torch.ones(4))
        assert layer.num_batches_tracked == 1
        assert torch.equal(layer.bias.grad, torch.full((4,), float(sizes[rank])))


@case
def sub_groups(rank):
    """Two processes of the three; the third stays alone."""
    pair, single = distributed.new_group([0, 2]), distributed.new_group([1])
    if rank == 1:
        alone = nf.SyncBatchNormAct(6, process_group=single, act="relu")
        twin = nf.BatchNormAct2d(6, act="relu")
        x = torch.randn(2, 6, 3, 3)
        assert torch.equal(alone(x), twin(x)) and torch.equal(alone.running_var, twin.running_var)
        stranger = nf.SyncBatchNormAct(6, process_group=pair)
        with pytest.raises(ValueError, match=r"must be a member, got a group without rank 1"):
            stranger(x)
        assert stranger.num_batches_tracked == 0
        stranger.eval()(x)
    else:
        layer, big = layer_and_big(rank // 2, (4, 3), group=pair)
        for key, value in layer.state_dict().items():
            close(key, value, big.state_dict()[key], 1e-6)
        twin = copy.deepcopy(layer)
        assert twin.process_group is pair and twin.weight is not layer.weight
        with pytest.raises(TypeError, match="ProcessGroup"):
            pickle.dumps(layer)
        layer.process_group = None
        assert torch.equal(pickle.loads(pickle.dumps(layer)).running_var, layer.running_var)


@case
def where_it_is_plain_batch_norm(rank):
    x = torch.randn(2 + rank, 6, 3, 3)
    for training in (False, True):
        layer, twin = nf.SyncBatchNormAct(6, act="silu", track_running_stats=False), nf.BatchNormAct2d(6, act="silu")
        layer.train(False)
        twin.track_running_stats = False
        twin.running_mean = twin.running_var = None
        assert torch.equal(layer(x), twin.train(training)(x))  # without statistics evaluation takes its own batch's
    layer, twin = nf.SyncBatchNormAct(6, act="silu").eval(), nf.BatchNormAct2d(6, act="silu").eval()
    assert torch.equal(layer(x), twin(x))
    assert nf.SyncBatchNormAct(6, device="meta")(torch.empty(2, 6, 3, device="meta")).shape == (2, 6, 3)


@case
def what_is_exchanged(rank):
    """2C + 1 numbers forward, 2C backward, nothing backward where x needs no gradient."""
    sent: list[int] = []
    gather = exchange.gather

    def counting(numbers, group):
        sent.append(numbers.numel())
        return gather(numbers, group)

    exchange.gather = counting
    try:
        layer = nf.SyncBatchNormAct(6, act="silu")
        for needs, expected in ((True, [13, 12]), (False, [13])):
            sent.clear()
            layer(torch.randn(2, 6, 3, 3).requires_grad_(needs)).sum().backward()
            assert sent == expected
    finally:
        exchange.gather = gather


@case
def same_bits(rank):
    layer = nf.SyncBatchNormAct(6, act="gelu")
    runs = []
    for _ in range(2):
        x = torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        runs.append((y, x.grad, layer.weight.grad.clone()))
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@case
def twice_differentiated(rank):
    """A gradient penalty: the gradient of the sum of all processes' |dL/dx|^2, as of one batch."""
    for (act, mode), sizes, name in zip(
        (("silu", None), ("leaky_relu", "pre_act"), ("gelu", "pre_act"), ("tanh", "post_act")), (UNEVEN, EMPTY, EVEN, EMPTY), NAMES * 4,
        strict=False,
    ):  # fmt: skip
        a = arguments(BATCH, (sum(sizes), 6, 3, 2), torch.float64, act=act, mode=mode)
        full, pull = data((sum(sizes), 6, 3, 2), torch.float64), data((sum(sizes), 6, 3, 2), torch.float64).sin()

        def penalty(y, x, weight, pull):
            (dx,) = torch.autograd.grad((y * pull).sum() + y.square().sum(), x, create_graph=True)
            return (dx.square() * pull).sum()

        x64, a64 = full.clone().requires_grad_(), a.wide()
        wanted = [x64, *a64.named().values()]
        expected = torch.autograd.grad(penalty(BATCH.oracle(x64, a64)[0], x64, a64.weight, pull), wanted)
        x = full.split(sizes)[rank].clone().requires_grad_()
        r = None if mode is None else a.residual.detach().split(sizes)[rank].clone().requires_grad_()
        y = nF.sync_batch_norm_act(
            x, None, None, a.weight, a.bias, True, act=(act, ACT_NUMBERS[act]) if act in ACT_NUMBERS else act, residual=r,
            residual_mode=mode or "pre_act", backend=name,
        )  # fmt: skip
        own = {"x": x, **{n: r if n == "residual" else t for n, t in a.named().items()}}
        found = torch.autograd.grad(penalty(y, x, a.weight, pull.split(sizes)[rank]), list(own.values()), allow_unused=True)
        for n, gradient, want in zip(own, found, expected, strict=True):
            if n in ("x", "residual"):
                close(f"{act} {mode} d{n}", gradient, want.split(sizes)[rank], 1e-10, scale=float(want.abs().max()))
            else:
                close(f"{act} {mode} d{n}", summed(torch.zeros_like(want) if gradient is None else gradient), want, 1e-10)


class _Net(nn.Module):
    """Two blocks, and a norm that sees the input itself."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.conv, self.norm, self.last = norm(3), nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.norm(self.conv(self.first(x))).mean((2, 3)))


def _nets():
    torch.manual_seed(1)
    synchronized = _Net(lambda c: nf.SyncBatchNormAct(c, act="silu"))
    torch.manual_seed(1)
    plain = _Net(lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()))
    return synchronized, plain


def _compare(synchronized, plain, gradients=True):
    theirs = [n.replace(".0.", ".") for n, _ in plain.named_parameters()]
    mine = dict(synchronized.named_parameters())
    for n, p in zip(theirs, plain.parameters(), strict=True):
        # the gradients of one process are those of a mean over its samples, averaged over the processes
        close(n, mine[n].grad if gradients else mine[n], p.grad if gradients else p, 1e-4)
    for (n, b), c in zip(synchronized.named_buffers(), plain.buffers(), strict=True):
        close(n, b, c, 1e-5)


def _ddp(rank, backwards, **options):
    """A step of two forwards through DistributedDataParallel, which rewrites the buffers before each, against the whole batches."""
    synchronized, plain = _nets()
    model = DistributedDataParallel(synchronized, **options)
    for step in range(2):
        batches = [torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(2 * step + i)) for i in range(2)]
        synchronized.zero_grad()
        plain.zero_grad()
        backwards(model, [b.split(2)[rank] for b in batches])
        for b in batches:  # BatchNorm's buffers may not change between its forward and its backward
            plain(b).square().mean().backward()
        _compare(synchronized, plain)


@case
def ddp_two_forwards_before_the_backward(rank):
    def together(model, batches):
        sum(model(b).square().mean() for b in batches).backward()

    _ddp(rank, together)
    _ddp(rank, together, gradient_as_bucket_view=True)


@case
def ddp_accumulates(rank):
    def accumulate(model, batches):
        for i, b in enumerate(batches):
            with model.no_sync() if i == 0 else contextlib.nullcontext():
                model(b).square().mean().backward()

    _ddp(rank, accumulate)


@case
def ddp_static_graph(rank):
    synchronized, plain = _nets()
    model = DistributedDataParallel(synchronized, static_graph=True)
    for step in range(3):
        b = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        synchronized.zero_grad()
        plain.zero_grad()
        model(b.split(2)[rank]).square().mean().backward()
        plain(b).square().mean().backward()
        _compare(synchronized, plain)


@case
def fully_sharded_mixed_precision(rank):
    """FSDP hands over bfloat16 inputs and parameters; statistics stay float32 and are those of the whole batch."""
    synchronized, plain = _nets()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = distributed.init_device_mesh("cpu", (SIZE,))
    for part in (synchronized.norm, synchronized):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    b = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    y = synchronized(b.split(2)[rank])
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    plain(b).square().mean().backward()
    assert synchronized.norm.running_var.dtype == torch.float32
    close("running mean", synchronized.first.running_mean, plain.first[0].running_mean, 2.0**-8)
    close("running variance", synchronized.norm.running_var, plain.norm[0].running_var, 2.0**-7)
    # rounded weights, maps and outputs: a few bfloat16 roundings, of which four are allowed to add up
    close("gradient", synchronized.norm.weight.grad.full_tensor(), plain.norm[0].weight.grad, 2.0**-6)


@case
def compiled_without_breaks(rank):
    """fullgraph, forward and backward, uneven and empty batches, a sub-group, the same numbers as eager."""
    torch._dynamo.reset()
    for sizes, options, form in ((EMPTY, {"momentum": None}, "contiguous"), (UNEVEN, {"memory_efficient": True}, "channels_last")):
        act = "leaky_relu" if "memory_efficient" in options else "silu"
        layer = nf.SyncBatchNormAct(6, act=act, process_group=distributed.group.WORLD if form == "contiguous" else None, **options)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=False)
        for step in range(2):
            whole = torch.randn(sum(sizes), 6, 4, 3, generator=torch.Generator().manual_seed(step))
            results = []
            for run, own in ((layer, layer), (compiled, twin)):
                x = layout(whole.split(sizes)[rank], form if sizes[rank] else "contiguous").requires_grad_()
                y = run(x, None)
                y.square().sum().backward()
                results.append((y, x.grad, own.weight.grad, *own.buffers()))
            for a, b in zip(*results, strict=True):
                strides = [[stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (a, b)]
                assert strides[0] == strides[1] or a.numel() == 0
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        distributed.barrier()  # a compilation may take one process longer than an exchange may wait


@case
def refused(rank):
    """One clear error in every process before anything is exchanged or counted."""
    layer = nf.SyncBatchNormAct(4)
    x = torch.randn(2, 4, 3)
    for kinds, match, call in (
        ((ValueError,), r"expected at least 2D input \(got 1D input\)", lambda: layer(x[0, 0])),
        ((ValueError, RuntimeError), r"norm_act: weight must have shape \(5,\).*got \(4,\)", lambda: layer(torch.randn(2, 5, 3))),
        ((TypeError,), "weight must be float64 to go with the input, got float32", lambda: layer(x.double())),
        ((TypeError,), "float32 or float64, got int64", lambda: layer(x.long())),
        ((ValueError, RuntimeError), r"residual must have the input's shape \(2, 4, 3\), got \(2, 4, 1\)", lambda: layer(x, x[..., :1])),
        ((ValueError,), r"at least 1 channel \(dim 1\), got shape \(2, 0\)", lambda: nf.SyncBatchNormAct(0)(torch.randn(2, 0))),
        ((ValueError,), "eps must be positive in training, got 0", lambda: nf.SyncBatchNormAct(4, eps=0.0)(x)),
        ((RuntimeError,), "group of 3 processes; use eval mode", lambda: torch.func.grad(lambda t: layer(t).sum())(x)),
        ((RuntimeError,), "group of 3 processes; use eval mode", lambda: torch.export.export(layer, (x,))),
    ):  # fmt: skip
        for kind in kinds:
            with pytest.raises(kind, match=match):
                call()
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros(4))


@case
def autocast_keeps_the_type(rank):
    layer = nf.SyncBatchNormAct(4, act="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 4, 3)).dtype == torch.float32
        assert layer(torch.randn(2, 4, 3).bfloat16()).dtype == torch.bfloat16


@case
def explained(rank):
    report = nf.explain(nf.SyncBatchNormAct(4, act="silu"), torch.randn(2, 4, 3, 3))
    assert report.path == "synchronized" and report.saved_bytes < 200
