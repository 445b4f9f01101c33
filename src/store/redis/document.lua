-- Shared by all scripts: this text stands in front of each of them.
-- Every script touches one key, checks and acts in one step, and returns
-- errors as data, so that they look alike on every version of Redis. A reply
-- is an array {status, now, ...}; `now` is the time of this server in
-- microseconds, from which the client learns its clock. These statuses are
-- common:
--
--   late          now is past the deadline; nothing was done
--   foreign       another type lives at the key
--   unreadable    {…, document}: its version cannot be told
--   larger        {…, size}: what is stored is too large to come along
--   out_of_range  {…, version}: it is beyond 2^53, where numbers are not exact
--   unknown       an earlier attempt may have been executed; nothing was done
--   failed        {…, error}: Redis refused a command

local MAX_RAISABLE = '9007199254740992' -- 2^53

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- A whole number as text. (%d writes it in half the time of %.0f.)
local function digits(number)
  return string.format('%d', number)
end

local function reply(status, ...)
  return {status, digits(now), ...}
end

-- Compares whole numbers as text: Lua would round what is beyond 2^53.
local function beyond(number, bound)
  if #number ~= #bound then return #number > #bound end
  return number > bound
end

-- The version of a document whose tail is not the usual one, from all of it.
local function version_of_whole(document)
  local readable, value = pcall(cjson.decode, document)
  if not readable or type(value) ~= 'table' then return nil end
  if type(value.key) ~= 'string' or type(value.metadata) ~= 'table' then return nil end
  local version = value.version
  if version == nil or version == cjson.null then return '0' end
  if type(version) ~= 'number' or version < 0 or version % 1 ~= 0 then return nil end
  -- cjson has rounded it already, 2^53 + 1 to 2^53; any greater number says "beyond".
  if version >= tonumber(MAX_RAISABLE) then return '9007199254740993', true end
  return digits(version)
end

-- What is stored at the key: nil and an error, or a table with
--   exists    whether anything is
--   version   digits; nil when the document is unreadable
--   inexact   true when `version` is not exact but beyond 2^53
--   tail      the end of the document
-- A value of more than `largest` bytes is not looked at whole.
local function look_up(key, largest)
  local tail = redis.pcall('GETRANGE', key, -160, -1)
  if type(tail) == 'table' then return nil, tail.err end
  if tail == '' and redis.call('EXISTS', key) == 0 then return {exists = false} end
  local found = {exists = true, tail = tail}
  -- The last brace closes the document, so this is its outer version. (Begun at the
  -- longest one that fits, and not at every byte before it.)
  found.version = string.match(tail, '[{,]"version":(%d+)}$', -32)
  if not found.version and redis.call('STRLEN', key) <= largest then
    found.version, found.inexact = version_of_whole(redis.call('GET', key))
  end
  if found.version == '0' then found.version = '1' end
  return found
end

-- Whether the call with this write id has written what was found.
local function was_written_by(write_id, found)
  if not found.version then return false end
  local version = '"version":' .. found.version .. '}'
  local tail = '"write_id":"' .. write_id .. '",' .. version .. ',' .. version
  return string.sub(found.tail, -#tail) == tail
end

-- What a refused command comes to. After a lost attempt, which may have been
-- executed before another type came to lie at the key, nothing is sure.
local function refuse(err, lost_since)
  if not string.find(err, 'WRONGTYPE', 1, true) then return reply('failed', err) end
  return reply(lost_since ~= '' and 'unknown' or 'foreign')
end

-- The reply of this status with the document at the key, or how large that is where
-- it has more than `largest` bytes.
local function reply_with_document(status, key, largest, expiry)
  local size = redis.call('STRLEN', key)
  if size > largest then return reply('larger', digits(size)) end
  return reply(status, redis.call('GET', key), expiry)
end

-- The size of a document that is replaced or removed, and its digest unless that
-- would take long.
local function last_trace(key, largest)
  local size = redis.call('STRLEN', key)
  if size > largest then return digits(size) end
  return digits(size), redis.sha1hex(redis.call('GET', key))
end
