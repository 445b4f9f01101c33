-- Removes a document: any version, or only one.
--
-- KEYS[1]  the key of the document
-- ARGV[1]  'any', or the version that must be stored
-- ARGV[2]  the deadline: not executed when `now` is past it
-- ARGV[3]  '' unless the answer to an earlier attempt was lost; then the
--          least possible time at which that attempt was executed
-- ARGV[4]  bytes of the largest document that is sent along with a refusal
-- ARGV[5]  bytes of the largest document that is looked at whole
-- ARGV[6]  the digest of the stored document, if its version was asked for, and
-- ARGV[7]  that version; see `look_up`
--
-- deleted   {…, version, size, digest}; version is '0' and the last two are
--           there when the document was unreadable
-- absent    nothing was there
-- conflict  {…, version}
-- early     {…, version}: nothing was done; wait until `now` is past the version

local key, condition, lost_since = KEYS[1], ARGV[1], ARGV[3]
local largest_in_reply, largest = tonumber(ARGV[4]), tonumber(ARGV[5])

if now > tonumber(ARGV[2]) then return reply('late') end
local found, err = look_up(key, largest, ARGV[6], ARGV[7])
if not found then return refuse(err, lost_since) end
if found.whole then return reply('whole', found.whole) end

if lost_since ~= '' then
  -- See write.lua. Nothing stored says nothing: this call or another one may
  -- have removed it.
  local matches = found.version == condition
  local older = found.version and beyond(lost_since, found.version)
  if not matches and not older then return reply('unknown') end
end
if not found.exists then return reply('absent') end

local version, size, digest = found.version, nil, nil
if not version then
  if condition ~= 'any' then
    return reply_with_document('unreadable', key, largest_in_reply)
  end
  version = '0'
  size, digest = last_trace(key, largest)
elseif condition ~= 'any' then
  if version ~= condition then return reply('conflict', version) end
end

-- A group that is created right after this must not get the version that is
-- deleted now, which may be ahead of the clock by some microseconds. One that is
-- far ahead was not made by this clock, and is not waited for.
local ahead = tonumber(version) - now
if ahead >= 0 and ahead < 100000 then return reply('early', version) end

local done = redis.pcall('DEL', key)
if type(done) == 'table' then return refuse(done.err, lost_since) end
return reply('deleted', version, size, digest)
