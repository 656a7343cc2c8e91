from igpt.programs.cli import main

raise SystemExit(main())
