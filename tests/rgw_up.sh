#!/usr/bin/env bash
# Starts a real S3 server for the tests: Ceph radosgw over one monitor and one OSD, all on 127.0.0.1, all state in DIR.
#   usage: rgw_up.sh DIR S3_PORT MONITOR_PORT          (root; Debian packages ceph-mon ceph-osd ceph-common radosgw)
# Credentials testkey / testsecret. Each daemon leaves its process id in DIR/*.pid; kill those to stop it. About 20 s.
set -euo pipefail

dir=$(realpath -m "$1") s3_port=$2 monitor="[v2:127.0.0.1:$3]"
mkdir -p "$dir"/{mon,osd,rgw}
cd "$dir"
fsid=$(cat /proc/sys/kernel/random/uuid)

cat >ceph.conf <<CONF
[global]
fsid = $fsid
mon_initial_members = a
mon_host = $monitor
ms_bind_msgr1 = false
public_network = 127.0.0.0/8
cluster_network = 127.0.0.0/8
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
# one copy on one disk: it lives for minutes
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
osd_memory_target = 939524096
bluestore_block_size = 5368709120
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 500
mon_data_avail_warn = 1
mon_data_avail_crit = 1
run_dir = $dir
keyring = $dir/keyring
admin_socket = $dir/\$name.asok
log_file = $dir/\$name.log
pid_file = $dir/\$name.pid
mon_data = $dir/mon
osd_data = $dir/osd
rgw_data = $dir/rgw
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:$s3_port
rgw_dns_name = localhost
CONF

wait_until() { # TEXT COMMAND...: until the command succeeds, 60 s at most
  local what=$1; shift
  for _ in $(seq 240); do "$@" >/dev/null 2>&1 && return; sleep .25; done
  echo "rgw_up.sh: $what did not come up within 60 s; see the logs in $dir" >&2
  exit 1
}
new_key() { ceph-authtool keyring --gen-key -n "$@" >/dev/null; }
osd_is_up() { ceph -c ceph.conf --connect-timeout 5 osd stat | grep -q "1 up"; }

ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
new_key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
new_key osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
new_key client.rgw.a --cap mon 'allow rwx' --cap osd 'allow rwx'

monmaptool --create --clobber --fsid "$fsid" --addv a "$monitor" monmap >/dev/null
ceph-mon -c ceph.conf -i a --mkfs --monmap monmap --keyring keyring
ceph-mon -c ceph.conf -i a

osd_uuid=$(cat /proc/sys/kernel/random/uuid)
ceph -c ceph.conf --connect-timeout 30 osd new "$osd_uuid" >/dev/null
ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$osd_uuid" 2>/dev/null
ceph-osd -c ceph.conf -i 0 2>/dev/null
wait_until "the OSD" osd_is_up

radosgw -c ceph.conf -n client.rgw.a
wait_until "radosgw" bash -c "exec 3<>/dev/tcp/127.0.0.1/$s3_port"
radosgw-admin -c ceph.conf user create --uid=test --display-name=test --access-key=testkey --secret=testsecret >/dev/null
