"""iSCSI: volumes as logical units of the distribution's ``tgtd``."""

from __future__ import annotations

from ._backing import Backing, choose_backing
from ._chap import Chap, read_chap
from ._daemon import Tgt, keep_tgtd, share_tgtd, shared_backing
from ._exports import UnitExports
from ._plan import FIRST_LUN, IQN_PREFIX, Plan, TargetPlan, UnitPlan, check_allowed, target_name

__all__ = [
    "FIRST_LUN",
    "IQN_PREFIX",
    "Backing",
    "Chap",
    "Plan",
    "TargetPlan",
    "Tgt",
    "UnitExports",
    "UnitPlan",
    "check_allowed",
    "choose_backing",
    "keep_tgtd",
    "read_chap",
    "share_tgtd",
    "shared_backing",
    "target_name",
]
