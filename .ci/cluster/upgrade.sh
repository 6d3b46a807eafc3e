# PATH has the programs of the new version: theirs is the pg_dump to take.
initdb --username=postgres --auth=trust --data-checksums --pgdata=new >/dev/null
pg_ctl start --wait --pgdata=new --log=log \
    --options="-c listen_addresses='' -c unix_socket_directories=$PWD"
pg_dumpall --host="$PRIMARY" --username=postgres --roles-only |
    grep ' users' | psql --host="$PWD" --username=postgres --quiet --set=ON_ERROR_STOP=1
pg_dump --host="$PRIMARY" --username=postgres --format=custom --create --file=users.dump users
pg_restore --host="$PWD" --username=postgres --dbname=postgres --create --exit-on-error users.dump
