"""The study of Duo-LLM (arXiv 2410.10846), figure by figure, on any duo model.

`study` measures and leaves numbers, `pictures` draws them, `claims` sets them beside what the paper says.
"""

from duorl.paper.claims import claims_page
from duorl.paper.pictures import draw
from duorl.paper.study import Study, StudySize, scaling

__all__ = ["Study", "StudySize", "claims_page", "draw", "scaling"]
