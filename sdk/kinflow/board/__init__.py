"""What the board under a device says of itself: heat, throttling, load, power. Readers are pure over a directory."""

from kinflow.board.state import BoardState, read_state
from kinflow.board.strain import judge
from kinflow.board.watch import BoardWatch

__all__ = ["BoardState", "BoardWatch", "judge", "read_state"]
