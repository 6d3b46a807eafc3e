# From the standby, so that the primary does not pay; then start what was taken, as a server alone.
pg_basebackup --checkpoint=fast --dbname="host=$STANDBY user=replicator" --pgdata=backup
rm backup/standby.signal
pg_ctl start --wait --pgdata=backup --log=log \
    --options="-c listen_addresses='' -c unix_socket_directories=$PWD"
