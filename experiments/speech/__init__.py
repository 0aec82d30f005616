"""Speech recognition by Whisper, over the frames that fit a part of the bytes."""
