"""How the displays say things."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03 or 0:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ago(seconds: float) -> str:
    """A time that is past, in its largest unit."""
    if seconds < 60:
        return f"{int(seconds)} s ago"
    return f"{int(seconds / 60)} min ago" if seconds < 5400 else f"{seconds / 3600:.1f} h ago"
