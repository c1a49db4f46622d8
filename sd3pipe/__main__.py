"""`python -m sd3pipe` is `sd3pipe`."""

from sd3pipe.cli import main

if __name__ == "__main__":
    main()
