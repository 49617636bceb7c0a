from .base import LogitRouter, Router
from .budget import BudgetRouter
from .calibration import ShiftedRouter, price_for, spent
from .card import describe
from .ensemble import EnsembleRouter
from .heads import HeadRouter
from .knn import KNNRouter
from .mixed import MixedRouter
from .simple import ConstantRouter, OracleRouter, PatternRouter, RandomRouter, ReplayRouter
from .stored import load

__all__ = [
    "BudgetRouter",
    "ConstantRouter",
    "EnsembleRouter",
    "HeadRouter",
    "KNNRouter",
    "LogitRouter",
    "MixedRouter",
    "OracleRouter",
    "PatternRouter",
    "RandomRouter",
    "ReplayRouter",
    "Router",
    "ShiftedRouter",
    "describe",
    "load",
    "price_for",
    "spent",
]
