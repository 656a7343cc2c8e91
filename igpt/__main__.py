from igpt.cli import main

raise SystemExit(main())
