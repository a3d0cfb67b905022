"""``python -m efficientnet``"""

import sys

from efficientnet.cli import main

sys.exit(main())
