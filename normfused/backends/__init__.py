"""The backends: `cuda`, `triton`, `torch`, `reference`. Each folder has the same steps under the same names.

A backend is a module with

``unavailable(device_type, dtype) -> str | None``
    None if it can run there, else a sentence saying why not.

``norm_act(p, x, residual, weight, bias, act_weight, rule_weight, running_mean, running_var, num_batches_tracked, bounds=None)
-> (y, mean, rstd, h)``
    A whole norm (moments -> coefficients -> apply) for the rule ``p.rule``. ``mean`` and ``rstd`` have ``p.moments_shape``,
    ``p.rstd_shape`` and ``p.accumulate`` (the rms rule returns an empty mean), never alias a buffer, and are all the
    backward needs beside x. ``h = x + residual`` is returned with ``residual_mode == "pre_norm"``, else None. With
    ``p.batch_statistics`` the running statistics given (None if untracked) and the counter are updated in place; without,
    they are read and not written. Of the renorm rule ``running_var`` is the running deviation, ``bounds`` are r_max and d_max, tensors of
    one value each, the running statistics are read before they are updated, and ``rstd`` is (scale, r, d), (3, C).

``norm_act_backward(p, dy, dh, x, z_source, weight, bias, act_weight, rule_weight, mean, rstd, needs)
-> (dx, dresidual, dweight, dbias, dact_weight, drule_weight)``
    ``x`` is h in pre_norm mode, where ``dx`` is the gradient of both x and residual and ``dh`` (may be None) is added to it. ``z_source``
    is what ``p.z_source`` names. ``needs`` is ``(dx, dresidual, parameters)``; what is not needed may be None.

``reads(t) -> bool``
    Whether x, residual, dy, dh or z_source may come as t, which is not dense in ``p.layout``; what may not comes as a dense copy.

and the four steps for rules written in PyTorch, one set per (n, c) (``p.scope == "sample_group"``, ``p.groups == p.C``;
coefficients are (N, C) in ``p.accumulate``):

``moments(p, x) -> (mean, var)``                                                             biased variance
``apply(p, x, residual, scale, shift, act_weight) -> y``                                     y = act(scale*x + shift [+ residual])
``grad_moments(p, dy, x, z_source, mean, scale, shift, act_weight) -> (sum_dz, sum_dz_xc, dact_weight)``
                                                                                             sums of dz and of dz*(x - mean)
``grad_apply(p, dy, x, z_source, mean, scale, shift, act_weight, dz_scale, q, r, needs) -> (dx, dresidual)``
                                                                                             dx = dz_scale*dz + q*(x - mean) + r

Tensors arrive checked and canonical: x, residual, dy, dh, z_source of x's shape and dense in ``p.layout`` (their memory is the
(N, C, S) array that `Problem` describes) unless ``reads`` takes them as they are, no element missing (numel > 0), parameters
contiguous of C elements (act_weight, rule_weight: 1 or C). y, h, dx, dresidual are new tensors made by `problem.empty_like(x)`: of
the strides of x if it is dense, else dense in ``p.layout``; each element is written once.
"""

from __future__ import annotations
