"""ViT-AdaLA's first stage: the frozen teacher sees the image, each linear attention answers its softmax attention's calls.

Source: ViT-AdaLA (arXiv 2603.16063). Only what makes queries, keys, their features and values is trained; the student's
blocks never run one after the other.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import LossOutput, UserError
from ..data.datasets import to_device
from ..evaluation import StudentMeter
from ..models.adapters import extract_features, stage_ends
from ..models.attention_calls import AttentionCall, recorded_attention
from ..models.linear_vit import linear_blocks
from ..models.teacher import Teacher
from ..objectives import attention_alignment, attention_errors
from .base import Task, compile_each_block, train_only


class AttentionAlignment(Task):
    """A linear ViT beside the teacher that it was made of.

    Args:
        student: of `models.linear_vit.linearize`.
        teacher: the softmax ViT that it was made of.
        stages: number of stages whose agreement is measured.

    Raises:
        UserError: no block of the student has linear attention, or more stages than blocks.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, *, stages: int):
        super().__init__()
        stage_ends(len(student.feature_info), stages)  # type: ignore[arg-type]  # refuses too many
        self.student = student
        self.teacher = teacher
        self.stages = stages
        self._blocks = linear_blocks(student)
        if not self._blocks:
            raise UserError("--keep-softmax-blocks", "all", "leaves no block to make linear; keep fewer")

    @property
    def backbone(self) -> nn.Module:
        return self.student

    def begin(self, device: torch.device) -> None:
        self.teacher.to(device)
        train_only(self, [parameter for _, attention in self._blocks for parameter in attention.projections()])

    def compile_blocks(self) -> None:
        compile_each_block(self.student)

    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of images ``[B, 3, H, W]`` in [0, 1]; masks are not used."""
        with recorded_attention(self.teacher.model, [number for number, _ in self._blocks]) as calls:
            self.teacher.features(batch["images"])
        loss = attention_alignment(self._answers(calls), [call.output for call in calls])
        return LossOutput(loss=loss, terms={"attention_alignment": loss.detach()})

    def _answers(self, calls: list[AttentionCall]) -> list[Tensor]:
        return [call.ask(attention) for call, (_, attention) in zip(calls, self._blocks, strict=True)]

    @torch.no_grad()
    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, float]:
        """How near each attention is to the one that it replaces, and the student as a whole to the teacher.

        Returns:
            ``loss``; ``attention_error_block1..N``, the mean squared error of each linear block (counted from 1) over the
            mean square of what it should answer: 0 for equal, 1 for silence; and what `StudentMeter` says.
        """
        self.eval()
        meter = StudentMeter(len(held_out.dataset))  # type: ignore[arg-type]  # it has a length
        numbers = [number for number, _ in self._blocks]
        errors = torch.zeros(2, len(numbers), dtype=torch.float64)
        for batch in held_out:
            batch = to_device(batch, device)
            with recorded_attention(self.teacher.model, numbers) as calls:
                teacher = self.teacher.features(batch["images"], stages=self.stages)
            student = extract_features(self.student, batch["images"], stages=self.stages)
            answers, wanted = self._answers(calls), [call.output for call in calls]
            losses = {"loss": attention_alignment(answers, wanted)}
            errors += len(batch["images"]) * attention_errors(answers, wanted).cpu()
            meter.update(losses, student, teacher, batch.get("labels"))
        scores = meter.scores(self.student, bank, device)
        relative = errors[0] / errors[1].clamp(min=1e-12)
        scores |= {f"attention_error_block{number + 1}": float(e) for number, e in zip(numbers, relative, strict=True)}
        self.train()
        return scores
