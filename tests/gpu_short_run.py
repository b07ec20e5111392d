"""Every Triton kernel once or twice on small ragged inputs: what compute-sanitizer watches."""

import torch

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.losses import DPO, SPO


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(4, 7, 24, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(1031, 24, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(1031, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(1031, (4, 7), device=device)
        labels[0, 3] = -100
        outputs = ("entropy", "log_sum_p2")
        for workspace in (None, 20_000):
            logp, extras = linear_logprob(
                hidden, weight, labels, bias=bias, outputs=outputs, workspace_bytes=workspace, backend="triton"
            )
            (logp.sum() + extras["entropy"].sum() + extras["log_sum_p2"].sum()).backward()
            linear_logprob(hidden, weight.detach(), labels, logit_softcap=9.0, backend="triton").sum().backward()
        reference = torch.zeros(4, device=device)
        for loss in (DPO(), SPO(penalty="hinge")):
            for path in ("two_pass", "packed", "factorised"):
                value, _ = fused_spo_loss(
                    hidden, weight, labels, loss=loss, ref_logps=reference, path=path, backend="triton"
                )
                value.backward()
        assert all(tensor.grad.isfinite().all() for tensor in (hidden, weight, bias))
    print("ran on", device)


if __name__ == "__main__":
    main()
