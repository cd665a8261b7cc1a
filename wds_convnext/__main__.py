from wds_convnext.cli import main

main()
