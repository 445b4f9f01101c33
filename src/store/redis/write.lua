-- Writes a document if its condition holds. A script and not MULTI, since the
-- new version depends on the stored one.
--
-- KEYS[1]  the key of the document
-- ARGV[1]  the document, with 16 zeros in the place of its version
-- ARGV[2]  the condition: 'any', 'absent', or the version that must be stored
-- ARGV[3]  time to live in milliseconds
-- ARGV[4]  '1' keeps what is left of the stored time to live
-- ARGV[5]  the deadline: not executed when `now` is past it
-- ARGV[6]  the write id, the same in every attempt of one call
-- ARGV[7]  '' unless the answer to an earlier attempt was lost; then the
--          least possible time at which that attempt was executed
-- ARGV[8]  '' or a version that the new one must be greater than
-- ARGV[9]  bytes of the largest document that is sent along with a refusal
-- ARGV[10] bytes of the largest document that is looked at whole
-- ARGV[11] the digest of the stored document, if its version was asked for, and
-- ARGV[12] that version; see `look_up`
--
-- written   {…, version, expiry in ms since 1970 or '-1', the version that was
--           replaced or '0', size, digest}; the last two, of an unreadable document
--           that was replaced, may be absent
-- conflict  {…, document or false, expiry of the document}

-- Of `N},"version":N}` with a version of 16 digits.
local TAIL_BYTES = 45

local key, document, condition = KEYS[1], ARGV[1], ARGV[2]
local write_id, lost_since = ARGV[6], ARGV[7]
local largest_in_reply, largest = tonumber(ARGV[9]), tonumber(ARGV[10])

if now > tonumber(ARGV[5]) then return reply('late') end
local found, err = look_up(key, largest, ARGV[11], ARGV[12])
if not found then return refuse(err, lost_since) end
if found.whole then return reply('whole', found.whole) end

local function expiry(ttl)
  return digits(math.floor(now / 1000) + ttl)
end

local function stored_expiry()
  local ttl = redis.call('PTTL', key)
  return ttl < 0 and '-1' or expiry(ttl)
end

local function conflict()
  if not found.exists then return reply('conflict', false) end
  return reply_with_document('conflict', key, largest_in_reply, stored_expiry())
end

if was_written_by(write_id, found) then
  return reply('written', found.version, stored_expiry(), '0')
end

local unreadable = found.exists and not found.version
local matches = found.exists and found.version == condition
if lost_since ~= '' then
  -- The lost attempt may have been executed, and its result replaced or
  -- removed since. What is stored tells, because a version never comes back
  -- and is never less than the time at which it was written.
  local older = found.version and beyond(lost_since, found.version)
  if not matches then
    if not older then return reply('unknown') end
    if condition ~= 'any' then return conflict() end
  end
elseif unreadable and condition ~= 'any' then
  return reply_with_document('unreadable', key, largest_in_reply)
elseif condition == 'absent' then
  if found.exists then return conflict() end
elseif condition ~= 'any' then
  if not matches then return conflict() end
end

-- The next version: a multiple of 16, not less than now, greater than the
-- stored one and the one it was given.
local lower = found.version or '0'
if beyond(ARGV[8], lower) then lower = ARGV[8] end
if not beyond(MAX_ISSUED, lower) then return reply('out_of_range', lower) end
local version = math.max(now - 1, tonumber(lower)) + 1
version = version + -version % 16
if version > tonumber(MAX_ISSUED) then return reply('out_of_range', lower) end
version = digits(version)

local size, digest
if unreadable then size, digest = last_trace(key, largest) end

local left = ARGV[4] == '1' and redis.call('PTTL', key) or -1
local keeps = left >= 0 -- 0: less than a millisecond
if not keeps then left = tonumber(ARGV[3]) end

local function set(text)
  if keeps then return redis.pcall('SET', key, text, 'KEEPTTL') end
  return redis.pcall('SET', key, text, 'PX', ARGV[3])
end

-- The version is put into the document where it is stored. A new text with the
-- version in it would take Redis as long as all the rest, since Lua looks at each
-- byte of a new text; it is made only where the version has another length (the
-- clock is at a time before 2001), or where the user must not SETRANGE.
local tail = version .. '},"version":' .. version .. '}'
local done = set(document)
if done.err then return refuse(done.err, lost_since) end
local place = #document - TAIL_BYTES
if #tail ~= TAIL_BYTES or redis.pcall('SETRANGE', key, place, tail) ~= #document then
  done = set(string.sub(document, 1, place) .. tail)
  if done.err then return refuse(done.err, lost_since) end
end
return reply('written', version, expiry(left), found.version or '0', size, digest)
